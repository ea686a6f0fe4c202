"""Finds the checkpoint to resume from among those in a run's folder.

Knows folders and files; the trainer knows what is in a checkpoint.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from tether.cli.recipe import Recipe
from tether.errors import ResumeError

_WRITTEN_LAST = "trainer_state.json"


def find_checkpoint(recipe: Recipe) -> str | None:
    """The checkpoint to resume from, if the recipe asks for one.

    Raises:
        ResumeError: If it does not exist, or if the folder holds checkpoints of two runs.
    """
    wanted, output_dir = recipe.script.resume, str(recipe.config.output_dir)
    if wanted is None:
        return None
    is_last = wanted.lower() == "true"
    found = last_checkpoint(output_dir) if is_last else Path(wanted)
    if found is None or not found.is_dir():
        raise ResumeError(
            problem=f"Cannot resume from the last checkpoint in {output_dir}: there is none."
            if is_last
            else f"Cannot resume from {wanted}: there is no such folder.",
            details=f"Paths start at the current folder, {Path.cwd()}.",
            instead="Name the folder of a checkpoint (out/checkpoint-100), or leave `resume` out to start a new run.",
        )
    if is_last and (newest := newest_checkpoint(output_dir)) not in (None, found):
        raise ResumeError(
            problem=f"Cannot resume from the last checkpoint in {output_dir}: it holds checkpoints of two runs.",
            details=f"{found.name} is the last by its number, and {newest} was written after it.",
            instead=f"Name one: `--resume {newest}`.",
        )
    return wanted if not is_last else str(found)


def last_checkpoint(output_dir: str) -> Path | None:
    """The checkpoint of the highest step in a folder; None without any."""
    return max(_complete(output_dir), key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def newest_checkpoint(output_dir: str) -> Path | None:
    """The checkpoint that was written last; among equally new ones, that of the highest step."""
    return max(_complete(output_dir), key=_time_and_step, default=None)


def _time_and_step(path: Path) -> tuple[float, int]:
    return (path / _WRITTEN_LAST).stat().st_mtime, int(path.name.rpartition("-")[2])


def _complete(output_dir: str) -> list[Path]:
    """The checkpoints that were written completely."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return [path for path in folders if _is_complete(path)]


def _is_complete(folder: Path) -> bool:
    try:
        json.loads((folder / _WRITTEN_LAST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
