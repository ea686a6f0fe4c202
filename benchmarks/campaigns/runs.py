"""The tiny trainings and passes of the campaigns, what comes of them undisturbed, and how they are killed.

What is made once for many trials lies in `HOME`.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig

from support.runs import make_trainer
from support.store_cases import in_fork
from support.tiny import tiny_model, tiny_pairs
from tether import BEMACallback, DPOTrainer
from tether.store import LogProbStore, tables

HOME = Path(tempfile.mkdtemp(prefix="tether-campaigns-"))
SYNC = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5}
KINDS: dict[str, Callable[[], dict[str, Any]]] = {
    "full": dict,
    "sync": lambda: SYNC,
    "lora": lambda: {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])},
    "lora-sync": lambda: SYNC | KINDS["lora"](),
    "bema": lambda: {"callbacks": [BEMACallback(update_freq=1, update_ref_model=True, ref_model_update_freq=2)]},
    "bco": lambda: {"loss_type": ["bco_pair"], "beta": 0.5},
    "precomputed": lambda: {"precompute_ref_log_probs": True},
}
ROWS, STEPS, PASS_ROWS = 8, 5, 40  # of the steps, one is in a second epoch
Values = dict[bytes, np.ndarray]


class Place:
    """Where a process ends itself as `kill -9` would: after some seconds, or at an operation.

    Args:
        seconds: After so many. The kernel ends the process then, whatever it is doing.
        operation: At the operation of this number.
    """

    def __init__(self, seconds: float | None = None, operation: int | None = None) -> None:
        self._seconds, self._operation, self.num_operations = seconds, operation, 0

    def arm(self) -> None:
        if self._seconds is not None:
            signal.setitimer(signal.ITIMER_REAL, self._seconds)  # nothing handles SIGALRM

    def operate(self) -> None:
        if self.num_operations == self._operation:
            os.kill(os.getpid(), signal.SIGKILL)
        self.num_operations += 1

    def watch_files(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit hook: each file opened to be written, each renaming and removal is an operation."""
        is_written = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if is_written or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            self.operate()


def until_killed(body: Callable[[], Any]) -> Any | None:
    """What `body` returns in a process of its own; None if that is killed."""
    try:
        return in_fork(body, patience_seconds=300)
    except AssertionError as error:
        if "the child died" not in str(error):
            raise
        return None


def make(out: Path, kind: str, **options: Any) -> DPOTrainer:
    """A trainer of one of the kinds, whose store, if any, lies beside its folder."""
    fixed = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2}
    store = {"ref_store": str(out.with_suffix(".sqlite"))} if kind == "precomputed" else {}
    return make_trainer(out, tiny_model(), tiny_pairs(ROWS), **fixed | store | KINDS[kind]() | options)


def train(out: Path, kind: str, checkpoint: str | None, place: Place, **options: Any) -> tuple[str, float, int]:
    """Trains to the end: the digest of what came out, seconds, and operations on files."""
    trainer = make(out, kind, **options)
    sys.addaudithook(place.watch_files)
    place.arm()
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    return digest(trainer), time.perf_counter() - start, place.num_operations


def digest(trainer: DPOTrainer) -> str:
    """Of each weight of the policy and of the reference."""
    bytes_seen = hashlib.sha256()
    for module in filter(None, (trainer.model, trainer.reference.module)):
        for name, tensor in sorted(module.state_dict().items()):
            bytes_seen.update(name.encode())
            bytes_seen.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return bytes_seen.hexdigest()


@dataclass(frozen=True)
class Whole:
    """An uninterrupted run."""

    folder: str
    digest: str
    seconds: float
    num_operations: int


def whole_run(kind: str, seed: int = 42) -> Whole:
    """The uninterrupted run of a kind, made at the first call."""
    folder = HOME / f"{kind}-{seed}"
    about = folder.with_suffix(".json")
    if not about.is_file():
        result = in_fork(partial(train, folder, kind, None, Place(), seed=seed), patience_seconds=300)
        about.write_text(json.dumps(asdict(Whole(str(folder), *result))))
    return Whole(**json.loads(about.read_text()))


def fill(path: Path, place: Place) -> tuple[int, float, int]:
    """A scoring pass, as `tether precompute` makes it: responses computed, seconds, and writes to the store.

    It may be killed in the middle of a write, before the transaction ends.
    """
    plain = tables.write_records

    def write(*arguments: Any) -> None:
        plain(*arguments)
        place.operate()

    tables.write_records = write
    start = time.perf_counter()
    place.arm()
    options = {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 2, "ref_store": str(path)}
    trainer = make_trainer(path.with_suffix(".out"), tiny_model(), tiny_pairs(PASS_ROWS), **options)
    return trainer.reference.num_computed, time.perf_counter() - start, place.num_operations


def whole_pass() -> tuple[Path, float, int]:
    """An uninterrupted pass, made at the first call: its store, seconds, and writes to the store."""
    path = HOME / "pass.sqlite"
    about = HOME / "pass.json"
    if not about.is_file():
        about.write_text(json.dumps(in_fork(partial(fill, path, Place()), patience_seconds=300)))
    _, seconds, num_writes = json.loads(about.read_text())
    return path, seconds, num_writes


def values_in(path: Path) -> Values:
    """Every record of a store, by its key."""
    if not path.is_file():
        return {}
    with LogProbStore(path) as store:
        return {key: v for identity in store.digests() for batch in store.batches(identity) for key, v in batch}
