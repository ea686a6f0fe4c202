#!/usr/bin/env bash
# Runs one stage on the machine at hand; where datasets and TRL are not installed, with the wheels of `carry.sh`:
#
#     bash benchmarks/gpu/run.sh STAGE [--scale toy]   # PYTHON=... for another than that of `make dev`, else python3
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python
python=${PYTHON:-$python}
export PYTHONPATH=$PWD/src PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TQDM_DISABLE=1
if ! "$python" -c 'import importlib.util as u, sys; sys.exit(None in map(u.find_spec, ("datasets", "trl")))'; then
    compgen -G 'benchmarks/gpu/wheels/*.whl' > /dev/null || {
        echo 'Not run: datasets or TRL are missing, and so are the wheels. Make them with benchmarks/gpu/carry.sh.' >&2
        exit 1
    }
    # Not a virtual environment: made from within another one, it would not see the packages of that one.
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" benchmarks/gpu/wheels/*.whl
    PYTHONPATH=$PYTHONPATH:$site
fi
timeout 300 "$python" benchmarks/gpu "$@"
