"""Runs one stage of the measurements on a GPU and keeps its results as JSON; `--scale toy` also runs on a CPU.

    python benchmarks/gpu step-8b                  # where tether and what `carry.sh` fetches are installed
    bash benchmarks/gpu/run.sh step-8b             # where only torch and transformers are
    bash benchmarks/gpu/run.sh step-8b --scale toy # tries it in seconds

Every stage is done in five minutes, and says in its JSON what it left out and what failed.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
import parts
import rounding
import sides
import steps
import suites
from stage import Stage

# In order of worth.
STAGES = {
    "tests": suites.tests,
    "step-8b": steps.steps,
    "qlora-8b": steps.steps,
    "step-1b": steps.steps,
    "attention": parts.attention,
    "noise": rounding.noise,
    "head": parts.head,
    "memory": steps.memory,
    "precompute": steps.precompute,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--scale", choices=("full", "toy"), default="full")
    parser.add_argument(
        "--out",
        type=Path,
        default=os.environ.get("OUT") or Path(__file__).with_name("out"),
        help="folder of the JSON (default $OUT, or benchmarks/gpu/out)",
    )
    arguments = parser.parse_args()
    sides.quiet()
    stage = Stage(arguments.stage, arguments.scale == "toy", arguments.out)
    if stage.device == "cpu" and not stage.toy:
        parser.error("torch sees no CUDA device here: try the stage with `--scale toy`")
    gc.freeze()  # what is imported by now: collecting between results then takes no time
    STAGES[arguments.stage](stage)
    print(stage.write())
    return int(bool(stage.failed))


if __name__ == "__main__":
    sys.exit(main())
