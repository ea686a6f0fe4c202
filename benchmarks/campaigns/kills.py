"""Trials that kill: what is started again until it is done must come to what an undisturbed run comes to.

A trial has up to four kills, half of them at a random moment, half at an operation on files or in a transaction.
"""

from __future__ import annotations

import random
import shutil
from functools import partial
from pathlib import Path

import numpy as np
from runs import KINDS, Place, Values, fill, train, until_killed, values_in, whole_pass, whole_run

from tether import last_checkpoint
from tether.store import LogProbStore
from tether.trainer.manifest import read_manifest
from tether.trainer.run_folder import read_last_run

EQUAL = "resumed equal"
ROUNDING = 1e-5  # nats per token; a pass that goes on scores in other batches


def kill_training(draw: random.Random, folder: Path) -> tuple[str, str, int]:
    """A training of any kind, half of them over the checkpoints of an older run, resumed from `last_checkpoint`."""
    kind, out = draw.choice(list(KINDS)), folder / "run"
    whole, older = whole_run(kind), None
    options = draw.choice([{}, {"save_total_limit": 2}])
    if draw.random() < 0.5:
        shutil.copytree(whole_run(kind, seed=5).folder, out)
        older = read_last_run(out)
    num_kills, most, step = 0, draw.randint(1, 4), 0
    while True:
        # Killed before it had noted its start, a run is started anew: what is there is the older run's.
        checkpoint = last_checkpoint(out) if read_last_run(out) != older else None
        reached = _step_of(checkpoint)
        if reached < step:
            return "LOST", f"{kind}: step {step} was kept, and then {checkpoint} was the last", num_kills
        step = reached
        place = _draw_place(draw, whole.seconds, whole.num_operations) if num_kills < most else Place()
        done = until_killed(partial(train, out, kind, checkpoint, place, **options))
        if done is not None:
            outcome = EQUAL if done[0] == whole.digest else "SILENT"
            return outcome, f"{kind}: {num_kills} kills, at last from {checkpoint}", num_kills
        if num_kills == most:
            return "RAW", f"{kind}: from {checkpoint}, it died by itself", num_kills
        num_kills += 1


def kill_precompute(draw: random.Random, folder: Path) -> tuple[str, str, int]:
    """A scoring pass into a store; nothing that was kept is scored again."""
    path, (whole, seconds, num_writes) = folder / "store.sqlite", whole_pass()
    expected, kept = values_in(whole), Values()
    num_kills, most = 0, draw.randint(1, 4)
    while True:
        place = _draw_place(draw, seconds, num_writes) if num_kills < most else Place()
        done = until_killed(partial(fill, path, place))
        now = values_in(path)
        if any(key not in now or (now[key] != value).any() for key, value in kept.items()):
            return "LOST", f"of {len(kept)} records kept, not all are there", num_kills
        if done is not None:
            return *_judge_store(path, now, expected, len(expected) - len(kept), done[0]), num_kills
        if num_kills == most:
            return "RAW", "it died by itself", num_kills
        num_kills, kept = num_kills + 1, now


def _judge_store(path: Path, now: Values, expected: Values, to_score: int, num_scored: int) -> tuple[str, str]:
    if num_scored != to_score:
        return "LOST", f"{num_scored} responses were scored, and {to_score} were missing"
    is_equal = now.keys() == expected.keys() and all(np.allclose(now[k], expected[k], 0, ROUNDING) for k in now)
    with LogProbStore(path) as store:
        damage = store.find_damage()
    return (EQUAL if is_equal and not damage else "SILENT"), f"{len(now)} records; {damage}"


def _draw_place(draw: random.Random, seconds: float, num_operations: int) -> Place:
    if draw.random() < 0.5:
        return Place(seconds=max(draw.random() * seconds, 0.001))
    return Place(operation=draw.randrange(num_operations))


def _step_of(checkpoint: str | None) -> int:
    manifest = None if checkpoint is None else read_manifest(Path(checkpoint))
    return 0 if manifest is None else manifest.step
