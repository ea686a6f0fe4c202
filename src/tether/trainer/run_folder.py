"""An output folder: the run that was last started in it, the process that trains there now, and its whole checkpoints.

`_tether_run.json` has them. transformers uploads nothing whose name starts with an underscore. Knows files and
processes; knows no trainer.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from tether.errors import ConfigurationError, TetherError
from tether.trainer.manifest import Manifest, fault_of, whole_manifest

if sys.platform != "win32":
    import fcntl

_FILE, _STAGING, _REPLACED = "_tether_run.json", "_tether_saving", "replaced"
_BEAT_SECONDS = 20.0
_CLOCK_SECONDS = 2.0  # by which two readings of when a process was started may differ


@dataclass(frozen=True)
class Owner:
    """The process that trains in a folder."""

    host: str
    pid: int
    born_at: float

    @classmethod
    def this(cls) -> Owner:
        return cls(socket.gethostname(), os.getpid(), psutil.Process().create_time())

    @property
    def is_dead(self) -> bool:
        """Whether it is known to have ended; of a process on another host nothing is known."""
        if self.host != socket.gethostname():
            return False
        try:
            process = psutil.Process(self.pid)
            has_ended = process.status() == psutil.STATUS_ZOMBIE  # and nobody has asked how
            return has_ended or bool(abs(process.create_time() - self.born_at) > _CLOCK_SECONDS)
        except psutil.NoSuchProcess:
            return True


@dataclass(frozen=True)
class LastRun:
    """The run that was last started in a folder.

    Attributes:
        run: Its name, as in the manifests of its checkpoints.
        started_at: When, in seconds since 1970.
        resumed_from: The checkpoint that it went on from; from the folder, if it is in it.
        saved_step: The step whose weights were saved as the run's model; None before.
        owner: The process that trains; None once it has ended.
    """

    run: str
    started_at: float
    resumed_from: str | None = None
    saved_step: int | None = None
    owner: Owner | None = None


def last_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The last whole checkpoint of the run that was last started in a folder, to resume it from.

    If that run has none of its own yet, the one that it was resumed from; None if it had just begun. Half-written
    checkpoints and those of earlier runs are passed over.

    Args:
        folder: The run's `output_dir`.

    Example:
        >>> trainer.train(resume_from_checkpoint=tether.last_checkpoint("out"))   # doctest: +SKIP
    """
    folder = Path(folder)
    whole, last = whole_checkpoints(folder), read_last_run(folder)
    run = last.run if last else max(whole.values(), key=lambda manifest: manifest.written_at).run if whole else ""
    own = {path: manifest.step for path, manifest in whole.items() if manifest.run == run}
    if own:
        return str(max(own, key=lambda path: own[path]))
    came_from = None if last is None or last.resumed_from is None else folder / last.resumed_from
    return str(came_from) if came_from and whole_manifest(came_from) else None


def whole_checkpoints(folder: Path) -> dict[Path, Manifest]:
    """The whole checkpoints in a folder, of any run, in the order of their steps."""
    found = {path: whole_manifest(path) for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name)}
    return dict(sorted(((p, m) for p, m in found.items() if m is not None), key=lambda item: item[1].step))


def passed_over(folder: Path, checkpoint: str | None) -> dict[str, str]:
    """The checkpoints in a folder that are newer than one and not whole, with what is wrong with each."""
    own = _NAME.fullmatch(Path(checkpoint).name) if checkpoint else None
    steps = {path: _NAME.fullmatch(path.name) for path in sorted(folder.glob("checkpoint-*"))}
    newer = [path for path, step in steps.items() if step and (own is None or int(step[1]) > int(own[1]))]
    return {path.name: fault for path in newer if (fault := fault_of(path))}


_NAME = re.compile(r"checkpoint-(\d+)")


def read_last_run(folder: Path) -> LastRun | None:
    """The run that was last started in a folder; None where none is known."""
    try:
        fields = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        return LastRun(**fields | {"owner": Owner(**fields["owner"]) if fields["owner"] else None})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def check_free(folder: Path) -> None:
    """Refuses a folder in which a process trains.

    Raises:
        ConfigurationError: Names the process.
    """
    last = read_last_run(folder)
    if last and last.owner and not last.owner.is_dead:
        raise _held_by(folder, last.owner, (folder / _FILE).stat().st_mtime)


class RunFolder:
    """The output folder of a run, which one process holds while it trains.

    Args:
        path: The folder.

    Attributes:
        staging: Where a checkpoint is written until it is whole.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.staging = path, path / _STAGING
        self.run = ""
        self._ended = threading.Event()

    @contextmanager
    def held(self, resumed_from: Path | None, *, take_over: bool) -> Iterator[None]:
        """A new run in this folder, which this process holds while open.

        Raises:
            ConfigurationError: If another process trains in it, unless `take_over`.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        start = LastRun(uuid.uuid4().hex, time.time(), self._named(resumed_from), owner=Owner.this())
        goes_on = start.resumed_from is not None and start.resumed_from == self._named(last_checkpoint(self.path))
        origin = whole_manifest(resumed_from) if resumed_from and goes_on else None
        with self._alone():
            if not take_over:
                check_free(self.path)
            last = read_last_run(self.path)
            is_saved = last and origin and last.saved_step == origin.step  # a later model is not what this run makes
            self._write(replace(start, saved_step=origin.step if origin and is_saved else None))
        self.run, self._ended = start.run, threading.Event()
        self.clear()
        threading.Thread(target=self._beat, args=(self._ended,), daemon=True).start()
        try:
            yield
        finally:
            self._ended.set()
            self._change(owner=None)

    def clear(self) -> None:
        """Removes what was left of a checkpoint that was not finished."""
        shutil.rmtree(self.staging, ignore_errors=True)

    @contextmanager
    def saving(self, name: str) -> Iterator[None]:
        """A block that writes a checkpoint.

        Raises:
            TetherError: If another run has taken the folder over, which removes what was not finished.
        """
        try:
            yield
        except Exception as error:  # of many kinds: of torch, safetensors, the file system
            self._check_held(name, error)
            raise

    def publish(self, name: str) -> Path:
        """Moves a checkpoint that is whole to its place; one of that name there goes as a whole.

        Raises:
            TetherError: If another run has taken the folder over.
        """
        self._check_held(name)
        place = self.path / name
        if place.exists():
            place.rename(self.staging / _REPLACED)
        (self.staging / name).rename(place)
        self.clear()
        return place

    def _check_held(self, name: str, cause: Exception | None = None) -> None:
        last = read_last_run(self.path)
        if last is not None and last.run != self.run:  # each machine's own disk has none but that of the main process
            raise TetherError(
                problem=f"Cannot keep {name} in {self.path}: another run has taken this folder over.",
                details=f"Process {last.owner.pid} on {last.owner.host} trains in it." if last.owner else "",
                instead="Give each run its own `output_dir`.",
            ) from cause

    def note_saved(self, step: int) -> None:
        """Notes that the run's model is saved with the weights of a step."""
        self._change(saved_step=step)

    def _change(self, **changes: Any) -> None:
        with suppress(FileNotFoundError), self._alone():
            last = read_last_run(self.path)
            if last is not None and last.run == self.run:
                self._write(replace(last, **changes))

    def _write(self, last: LastRun) -> None:
        new = self.path / f"{_FILE}.new"
        new.unlink(missing_ok=True)
        with new.open("x", encoding="utf-8") as file:
            json.dump(asdict(last), file)
        new.replace(self.path / _FILE)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """While open, no other process reads and then writes the file."""
        if sys.platform == "win32":  # does not lock folders
            yield
            return
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _named(self, checkpoint: str | Path | None) -> str | None:
        if checkpoint is None:
            return None
        path, home = Path(checkpoint).resolve(), self.path.resolve()
        return str(path.relative_to(home) if path.is_relative_to(home) else path)

    def _beat(self, ended: threading.Event) -> None:
        while not ended.wait(_BEAT_SECONDS):
            with suppress(OSError):
                os.utime(self.path / _FILE)


def _held_by(folder: Path, owner: Owner, seen_at: float) -> ConfigurationError:
    return ConfigurationError(
        problem=f"Cannot train in {folder}: process {owner.pid} on {owner.host} is training there, and two runs would "
        "mix their checkpoints.",
        details=f"It gave its last sign of life {max(time.time() - seen_at, 0):,.0f} s ago.",
        instead="Use another `output_dir`, or wait for its end. If that process is gone, or is to lose its folder, set "
        "`take_over=True` (`--take_over`).",
    )
