"""Claim: accuracy and margin call a ruined model the better one; the other figures of a run, and its answers, tell.

Runs `tether demo` on a real model with two seeds, on held-out questions by which no setting was chosen.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import harness

from tether.demo.run import run_demo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the tiny model and few steps; writes nothing")
    quick = parser.parse_args().quick
    results = [_measured(seed, quick) for seed in range(2)]
    if not quick:
        print(harness.write_results("demo", results, "cpu"))


def _measured(seed: int, quick: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        result = run_demo(folder, seed=seed, quick=quick)
    return {"seed": seed, "answers": result.answers, "figures": result.figures}


if __name__ == "__main__":
    main()
