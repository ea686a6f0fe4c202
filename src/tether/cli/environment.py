"""What a bug report needs: versions, devices, the store. Knows no recipe."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from tether.store import default_store_path

_NEEDED = ("tether", "torch", "transformers", "accelerate", "peft", "datasets", "tokenizers", "safetensors", "numpy")
_USED = ("pyarrow", "pydantic", "typer", "bitsandbytes", "deepspeed", "trl")


def describe_environment() -> str:
    """One line each, as `name  value`."""
    store = default_store_path()
    rows = {
        "Python": f"{platform.python_version()}, {platform.platform()}",
        **{name: _version_of(name) for name in (*_NEEDED, *_USED)},
        "devices": _devices(),
        "store": f"{store} ({store.stat().st_size / 1e6:,.1f} MB)" if store.is_file() else f"{store} (not created yet)",
    }
    return "\n".join(f"{name:<14}{value}" for name, value in rows.items())


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> str:
    if not torch.accelerator.is_available():
        return f"CPU, {torch.get_num_threads()} threads"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join(names) or f"{torch.accelerator.device_count()} x {torch.accelerator.current_accelerator()}"
