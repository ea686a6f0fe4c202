"""What a checkpoint keeps of a run besides what transformers keeps: the reference, and how many tokens were seen.

Knows files and references; knows no trainer.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from tether.errors import ResumeError
from tether.reference import Reference

if TYPE_CHECKING:
    from tether.config import DPOConfig

logger = logging.getLogger(__name__)

_FOLDER, _IDENTITY, _PROGRESS = "reference", "identity.json", "progress.json"


def save_reference(checkpoint: Path, reference: Reference, num_tokens: float) -> None:
    """Writes the reference's identity and state (`checkpoint/reference/`), and the tokens trained on."""
    folder = checkpoint / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _IDENTITY).write_text(json.dumps(reference.identity.describe(), indent=2))
    (checkpoint / _PROGRESS).write_text(json.dumps({"num_tokens": num_tokens}))
    reference.save(folder)


def load_reference(checkpoint: Path, reference: Reference) -> int:
    """Restores the reference's state and returns the tokens trained on.

    Raises:
        ResumeError: If the checkpoint was trained against another reference, or does not say against which.
    """
    folder = checkpoint / _FOLDER
    _check_same(folder, reference)
    reference.load(folder)
    return int(json.loads((checkpoint / _PROGRESS).read_text())["num_tokens"])


def warn_of_weights_alone(args: DPOConfig) -> None:
    """Says what checkpoints of weights alone lose when the reference moves."""
    if args.save_only_model and args.save_strategy != "no":
        logger.warning(
            "`save_only_model=True` with `sync_ref_model=True`: the checkpoints will not hold the moving reference, so "
            "no run can be resumed from them, and the average reached there is lost. `trainer.save_reference(folder)` "
            "keeps the last one."
        )


def warn_of_no_sync(args: DPOConfig, num_steps: int) -> None:
    """Says when a run ends before its first sync."""
    if args.sync_ref_model and args.ref_model_sync_steps > num_steps:
        logger.warning(
            f"`sync_ref_model=True`, but the reference will not move: its first sync would come after "
            f"{args.ref_model_sync_steps} optimizer steps, and this run has {num_steps}. Set `ref_model_sync_steps` to "
            "less."
        )


def _check_same(folder: Path, reference: Reference) -> None:
    path = folder / _IDENTITY
    if not path.is_file():
        raise ResumeError(
            asked=f"Resuming from {folder.parent}.",
            why="It does not say which reference its run was trained against, so it cannot be the same one for sure.",
            instead="Resume from a checkpoint written by Tether without `save_only_model=True`, or start a new run.",
        )
    saved, own = json.loads(path.read_text()), reference.identity.describe()
    differing = [name for name in own if saved.get(name) != own[name]]
    if differing:
        there, here = ({name: side.get(name) for name in differing} for side in (saved, own))
        raise ResumeError(
            asked=f"Resuming from {folder.parent} with another reference.",
            why=f"It differs in {', '.join(differing)}: the checkpoint has {there}, this trainer {here}.",
            instead="Build the trainer from the same initial model (not from the checkpoint's weights) and with the "
            "same reference options, or start a new run.",
        )
