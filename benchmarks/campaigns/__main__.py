"""Kills training and scoring passes, damages what they keep, and counts what comes of it (docs/promises.md).

A trial is decided by its campaign's name and its number, and runs in a process forked from this one, which has
everything imported. Counts add up from run to run, in `results/campaigns-cpu.json`.

    python benchmarks/campaigns                                        # the full numbers, about an hour
    python benchmarks/campaigns --share 0.1                            # a tenth
    python benchmarks/campaigns --only "kills of training" --trial 7   # one trial again, counted nowhere
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
from tqdm import tqdm
from xxhash import xxh3_64

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
import harness
import runs
from damages import damage_checkpoint, damage_export, damage_rows, damage_store, train_on_damage
from kills import kill_precompute, kill_training

from support.store_cases import in_fork

BAD = ("SILENT", "RAW", "LOST")


@dataclass(frozen=True)
class Campaign:
    """Trials of one kind.

    Attributes:
        unit: What is counted.
        number: How many the full campaign has.
        trial: Makes one trial in a folder, as the draws decide: its outcome, a detail, and how many units it had.
    """

    unit: str
    number: int
    trial: Callable[[random.Random, Path], tuple[str, str, int]]


CAMPAIGNS = {
    "kills of precompute": Campaign("kills", 1000, kill_precompute),
    "kills of training": Campaign("kills", 300, kill_training),
    "damages to checkpoints": Campaign("damages", 400, damage_checkpoint),
    "damages to stores": Campaign("damages", 300, damage_store),
    "training on damaged stores": Campaign("damages", 50, train_on_damage),
    "flipped bits in exports": Campaign("damages", 200, damage_export),
    "flipped bits in exported rows": Campaign("damages", 50, damage_rows),
}
Counts = dict[str, Any]


def main() -> int:
    asked = _parse_arguments()
    if asked.results is not None:
        harness.RESULTS = asked.results
    try:
        _warm_up()
        if asked.trial is None:
            return _run(asked)
        outcome, detail, _ = run_trial(asked.only, asked.trial)
        print(f"{outcome}: {detail}")
        return int(outcome in BAD)
    finally:
        shutil.rmtree(runs.HOME, ignore_errors=True)


def _run(asked: argparse.Namespace) -> int:
    counts, stops = _read_counts(asked.anew), list[int]()
    signal.signal(signal.SIGINT, lambda number, frame: stops.append(number))  # after the trial, with its count
    for name in CAMPAIGNS if asked.only is None else [asked.only]:
        run_campaign(counts, name, asked.share, stops)
    for count in counts:
        outcomes = ", ".join(f"{number} {outcome}" for outcome, number in count["outcomes"].items())
        print(f"{count['campaign']}: {count['units']} {count['unit']} in {count['trials']} trials: {outcomes}")
        for trial, outcome, detail in count["failures"][:5]:
            print(f"  {outcome}: {detail}")
            print(f'  again: python benchmarks/campaigns --only "{count["campaign"]}" --trial {trial}')
    return int(any(count["failures"] for count in counts))


def run_campaign(counts: list[Counts], name: str, share: float, stops: list[int]) -> None:
    """Adds a share of a campaign's full number to its counts, which are written after each trial."""
    campaign, count = CAMPAIGNS[name], next((each for each in counts if each["campaign"] == name), None)
    if count is None:
        count = {"campaign": name, "unit": campaign.unit, "units": 0, "trials": 0, "seconds": 0.0}
        counts.append(count := count | {"outcomes": {}, "failures": [], "code": _code()})
    goal = count["units"] + max(1, round(share * campaign.number))
    with tqdm(total=goal, initial=count["units"], desc=name, unit=f" {campaign.unit}", disable=None) as bar:
        while count["units"] < goal and not stops:
            start = time.perf_counter()
            outcome, detail, units = run_trial(name, count["trials"])
            if outcome in BAD:
                count["failures"].append([count["trials"], outcome, detail])
            count["outcomes"][outcome] = count["outcomes"].get(outcome, 0) + 1
            count["units"] += units
            count["trials"] += 1
            count["seconds"] = round(count["seconds"] + time.perf_counter() - start, 1)
            harness.write_results("campaigns", counts, "cpu")
            bar.update(units)


def run_trial(name: str, number: int) -> tuple[str, str, int]:
    """Makes a trial in a process and a folder of its own. An error that it does not expect is a raw one."""
    with tempfile.TemporaryDirectory(prefix="tether-trial-") as folder:
        trial = partial(CAMPAIGNS[name].trial, random.Random(f"{name} {number}"), Path(folder))
        try:
            outcome: tuple[str, str, int] = in_fork(partial(_alone, trial), patience_seconds=600)
        except BaseException:
            return "RAW", traceback.format_exc()[-2000:], 1
        return outcome


def _alone(trial: Callable[[], Any]) -> Any:
    """What a trial returns, made in silence; Ctrl-C is for the process that counts."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)
    return trial()


def _warm_up() -> None:
    """Imports and first calls that every process would make again otherwise."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    tqdm.set_lock(threading.RLock())  # its own is shared by all processes, and a killed one keeps it
    tqdm.monitor_interval = 0
    os.environ["TETHER_HOME"] = str(runs.HOME)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        for kind in ("lora-sync", "bco", "precomputed"):
            runs.make(runs.HOME / f"warm-{kind}", kind, max_steps=1).train()


def _read_counts(is_anew: bool) -> list[Counts]:
    """The counts to add to; those of other code or of another machine are not mixed with new ones."""
    path = harness.RESULTS / "campaigns-cpu.json"
    counts = harness.read_results("campaigns", "cpu")
    if is_anew or not path.is_file():
        return []
    if not counts or any(count["code"] != _code() for count in counts):
        sys.exit(f"{path} has counts of other code or of another machine: --anew starts at zero.")
    return counts


def _code() -> str:
    """A digest of the package's code."""
    files = sorted((harness.ROOT / "src").rglob("*.py"))
    return xxh3_64(b"".join(path.read_bytes() for path in files)).hexdigest()


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of the full numbers, to be added to the counts")
    parser.add_argument("--only", choices=CAMPAIGNS, help="one campaign")
    parser.add_argument("--trial", type=int, help="repeat one trial of it, and say what came of it")
    parser.add_argument("--anew", action="store_true", help="start at zero")
    parser.add_argument("--results", type=Path, help="the folder of the counts (default: benchmarks/results)")
    asked = parser.parse_args()
    if asked.trial is not None and asked.only is None:
        parser.error("--trial needs --only")
    return asked


if __name__ == "__main__":
    sys.exit(main())
