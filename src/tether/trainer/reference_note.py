"""`reference.json` beside a saved policy: which model it was trained against, by name and by digest.

Written for `tether ask` and for people; nothing of a run reads it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tether.reference import Reference
from tether.trainer.setup import Checked

REFERENCE_FILE = "reference.json"
# What `from_pretrained` must be told again to read the same weights.
_WHERE = ("revision", "subfolder", "gguf_file")


def source_name(checked: Checked, reference: Reference) -> str:
    """The path or name of the model that a reference was made from; empty if it has none, or is not known."""
    if not reference.identity.base:  # no weights: reference-free, given, a server
        return ""
    if checked.facts.reference is not None:
        return str(getattr(getattr(reference.module, "config", None), "_name_or_path", ""))
    return checked.around.origins[0].name if checked.around.origins else ""


def write_reference_note(trainer: Any, folder: Path, name: str) -> None:
    """Writes the note of a run into the folder of its model.

    Args:
        trainer: The run.
        folder: Where its model is.
        name: Where its reference's weights came from.
    """
    reference: Reference = trainer.reference
    options = trainer.args.model_init_kwargs if isinstance(trainer.args.model_init_kwargs, dict) else {}
    weights = reference.module if reference.module is not None else trainer.model
    dtype = next(p.dtype for p in weights.parameters() if p.is_floating_point())
    note = {
        "model": name or None,
        "options": {key: options[key] for key in _WHERE if key in options},
        "dtype": str(dtype).removeprefix("torch."),
        **reference.identity.describe(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REFERENCE_FILE).write_text(json.dumps(note, indent=2), encoding="utf-8")
