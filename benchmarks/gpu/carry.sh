#!/usr/bin/env bash
# Collects what a CUDA machine without a network may lack beside torch, transformers, accelerate and their own needs:
# wheels in benchmarks/gpu/wheels, which git ignores. `run.sh` installs them there.
#
#     bash benchmarks/gpu/carry.sh                     # for Python 3.12 on x86-64
#     PYTHON_VERSION=3.11 bash benchmarks/gpu/carry.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

wheels=benchmarks/gpu/wheels
download=(
    "${PYTHON:-python3}" -m pip download --quiet --dest "$wheels" -c constraints.txt --only-binary=:all:
    --python-version "${PYTHON_VERSION:-3.12}" --implementation cp
    --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64
    --platform manylinux2014_x86_64
)

rm -rf "$wheels"
"${download[@]}" multiprocess pydantic # each asks for one version of what is beneath it
"${download[@]}" --no-deps beartype bitsandbytes datasets jaxtyping liger-kernel peft pytest pytest-timeout \
    pytest-xdist trl typer wadler-lindig
du --human-readable --apparent-size --total "$wheels"/*.whl
