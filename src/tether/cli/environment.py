"""What a bug report needs: versions, devices, the store. Knows no recipe."""

from __future__ import annotations

import platform
import re
from importlib.metadata import PackageNotFoundError, requires, version

import torch

from tether.store import default_store_path


def describe_environment() -> str:
    """A line each, as `name  value`."""
    store = default_store_path()
    rows = {
        "Python": f"{platform.python_version()}, {platform.platform()}",
        **_versions(),
        "devices": _devices(),
        "store": f"{store} ({store.stat().st_size / 1e6:,.1f} MB)" if store.is_file() else f"{store} (not there yet)",
    }
    return "\n".join(f"{name:<18}{value}" for name, value in rows.items())


def _versions() -> dict[str, str]:
    """Of what tether needs or can use, as far as it is installed."""
    found = {}
    for name in ("tether", *sorted(re.split(r"[^\w-]", needed)[0] for needed in requires("tether") or ())):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _devices() -> str:
    if not torch.accelerator.is_available():
        return f"CPU, {torch.get_num_threads()} threads"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join(names) or f"{torch.accelerator.device_count()} x {torch.accelerator.current_accelerator()}"
