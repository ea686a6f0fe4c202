"""Silences unneeded messages of libraries in a command's output."""

from __future__ import annotations

import os

import torch


def quiet_deepspeed() -> None:
    """Tells DeepSpeed to use the CPU if there is no accelerator; otherwise it logs at import that it found none."""
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
