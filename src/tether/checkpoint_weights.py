"""A checkpoint's weights into a model whose tensors are named otherwise in files than in memory.

`save_pretrained` writes some families under older names, or cut into other tensors (mixtures of experts,
vision-language models, GPT-NeoX's head). `transformers.Trainer` reads the file as it is: what it does not find by name
stays as it was, with a warning, and a resumed run goes on from other weights than it was saved with.

Knows files and transformers models; knows no trainer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from tether.distributed import has_shards
from tether.errors import ResumeError


def load_renamed_weights(model: nn.Module, checkpoint: Path) -> bool:
    """Loads the weights if the file has names that the model does not have; says whether it did.

    Nothing is done for adapters, whose checkpoints have their own names, and for sharded models, which FSDP and
    DeepSpeed load.

    Raises:
        ResumeError: If a tensor of the model is not in the checkpoint.
    """
    names = _names_in(checkpoint)
    if not isinstance(model, PreTrainedModel) or has_shards(model) or names <= model.state_dict().keys():
        return False
    kind: Any = type(model)
    loaded, info = kind.from_pretrained(checkpoint, config=model.config, dtype="auto", output_loading_info=True)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ResumeError(
            asked=f"Resume from {checkpoint}.",
            why=f"It has no weights for {', '.join(missing[:3])}{' and others' * (len(missing) > 3)} of the "
            f"{type(model).__name__}: they would stay as they are.",
            instead="Resume from a checkpoint of the same model.",
        )
    model.load_state_dict(loaded.state_dict())
    return True


def _names_in(checkpoint: Path) -> set[str]:
    """The names of the tensors in a checkpoint of whole models; none where there is no such file."""
    index, whole = checkpoint / SAFE_WEIGHTS_INDEX_NAME, checkpoint / SAFE_WEIGHTS_NAME
    if index.is_file():
        return set(json.loads(index.read_text())["weight_map"])
    if whole.is_file():
        with safe_open(whole, "pt") as file:
            opened: Any = file
            return set(opened.keys())
    return set()
