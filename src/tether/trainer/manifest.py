"""A checkpoint's `manifest.json`: which run wrote it at which step, and every file of it with its checksum.

It is written last, so a checkpoint that has one is whole. Knows files; what a run says of itself in it, `resuming`
knows.
"""

from __future__ import annotations

import json
import mmap
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from xxhash import xxh3_64

from tether.errors import ResumeError, TetherError

MANIFEST = "manifest.json"
_VERSION = 1
_MAPPED_BYTES = 1 << 20  # from here on, mapping a file is faster than reading it


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is.

    Attributes:
        run: The run that wrote it; each start of training is a run, also one that resumes another.
        step: Optimizer steps taken.
        about: What the run said of itself (`resuming.AboutRun`).
        files: Bytes and checksum of each file, by its path in the checkpoint.
        written_at: When, in seconds since 1970.
    """

    run: str
    step: int
    about: dict[str, Any]
    files: dict[str, tuple[int, str]]
    written_at: float = field(default_factory=time.time)


def write_manifest(checkpoint: Path, run: str, step: int, about: dict[str, Any]) -> None:
    """Writes the manifest of a checkpoint to which nothing else will be written."""
    files = {name: (path.stat().st_size, _checksum(path)) for name, path in _files_in(checkpoint).items()}
    fields = asdict(Manifest(run, step, about, files)) | {"version": _VERSION}
    text = json.dumps(fields | {"checksum": _checksum_of(fields)})
    (checkpoint / MANIFEST).write_text(text, encoding="utf-8")


def read_manifest(checkpoint: Path) -> Manifest | None:
    """The manifest of a checkpoint; None without one.

    Raises:
        ResumeError: If it is damaged, or of a newer version.
    """
    path = checkpoint / MANIFEST
    if not path.is_file():
        return None
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        is_right = fields.pop("checksum") == _checksum_of(fields) and not any(map(_leads_out, fields["files"]))
        version = fields.pop("version")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        is_right, version = False, _VERSION
    if not is_right or version != _VERSION:
        what = f"is of version {version}, and this Tether reads version {_VERSION}" if is_right else "is damaged"
        raise ResumeError(problem=f"Cannot resume from {checkpoint}: its {MANIFEST} {what}.", instead=_ANOTHER)
    files = {name: (size, checksum) for name, (size, checksum) in fields.pop("files").items()}
    return Manifest(**fields, files=files)


def whole_manifest(checkpoint: Path) -> Manifest | None:
    """The manifest of a checkpoint that has all its files at their sizes; None for any other."""
    return None if fault_of(checkpoint) else read_manifest(checkpoint)


def fault_of(checkpoint: Path) -> str | None:
    """Why a checkpoint does not have all its files at their sizes; None if it does."""
    try:
        manifest = read_manifest(checkpoint)
    except ResumeError as error:
        return error.problem.removeprefix(f"Cannot resume from {checkpoint}: ").rstrip(".")
    if manifest is None:
        return f"it has no {MANIFEST}"
    faults = (_fault(checkpoint, name, size) for name, (size, _) in manifest.files.items())
    return next(filter(None, faults), None)


def check_files(checkpoint: Path, manifest: Manifest, doing: str = "resume from", instead: str = "") -> None:
    """Compares every file with the manifest.

    Args:
        checkpoint: The folder.
        manifest: Its manifest.
        doing: What it is wanted for.
        instead: What to do instead; by default, to resume from another.

    Raises:
        ResumeError: Names each file that is missing or is not what was written.
    """
    found = (_fault(checkpoint, name, *expected) for name, expected in manifest.files.items())
    faults = [fault for fault in found if fault]
    if faults:
        raise ResumeError(
            problem=f"Cannot {doing} {checkpoint}: {faults[0]}.",
            details="\n  ".join(f"{fault[0].upper()}{fault[1:]}." for fault in faults[1:]),
            instead=instead or _ANOTHER,
        )


@contextmanager
def listed_alone(checkpoint: Path, manifest: Manifest | None) -> Iterator[Path]:
    """A folder with the files of a checkpoint that its manifest lists: the checkpoint itself, or links to them.

    What else is in the checkpoint is left alone. Libraries look for files of many names, and would read it.
    """
    if manifest is None or _files_in(checkpoint).keys() <= manifest.files.keys():
        yield checkpoint
        return
    with TemporaryDirectory(prefix="tether-") as folder:
        view = Path(folder) / checkpoint.name
        for name in manifest.files:
            (view / name).parent.mkdir(parents=True, exist_ok=True)
            (view / name).symlink_to((checkpoint / name).resolve())
        try:
            yield view
        except TetherError as error:
            error.problem = error.problem.replace(str(view), str(checkpoint))
            error.instead = error.instead.replace(str(view), str(checkpoint))
            raise


_ANOTHER = "Resume from another checkpoint, or start a new run."


def _fault(checkpoint: Path, name: str, size: int, checksum: str | None = None) -> str | None:
    path = checkpoint / name
    try:
        found = path.stat().st_size
        if found != size:
            return f"`{name}` has {found:,} bytes, and {size:,} were written"
        is_right = checksum is None or _checksum(path) == checksum
        return None if is_right else f"`{name}` is not what was written (its checksum differs)"
    except FileNotFoundError:
        return f"`{name}` is missing"
    except OSError as error:
        return f"`{name}` cannot be read ({error.strerror})"


def _files_in(checkpoint: Path) -> dict[str, Path]:
    paths = (Path(folder) / name for folder, _, names in os.walk(checkpoint) for name in names)
    named = {path.relative_to(checkpoint).as_posix(): path for path in paths}
    return {name: named[name] for name in sorted(named) if name != MANIFEST}


def _leads_out(name: str) -> bool:
    return PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size < _MAPPED_BYTES:
            return xxh3_64(file.read()).hexdigest()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return xxh3_64(content).hexdigest()


def _checksum_of(fields: dict[str, Any]) -> str:
    return xxh3_64(json.dumps(fields, sort_keys=True).encode()).hexdigest()
