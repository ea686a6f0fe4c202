"""What libraries would say in a command's output, and need not."""

from __future__ import annotations

import os

import torch


def quiet_deepspeed() -> None:
    """Where it is installed, it says at its import that it found no accelerator; before that, it can be told so."""
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
