"""Starts a script of `tests/support/scripts` in one process or in several, and reads what each of them saw."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch

TESTS = Path(__file__).parents[1]

# transformers restores an optimizer to its process's device, `cpu:0`, which torch 2.11 does not know.
torch.serialization.register_package(
    0, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
)


def leave(folder: Path, seen: Any) -> NoReturn:
    """Writes what this process of a script saw, and ends it when all of them are done.

    Not through the interpreter's end: a thread of gloo may still let go of Python objects there, and abort.
    """
    (folder / f"process-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(seen))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def launch(script: str, folder: Path, *arguments: str, num_processes: int = 1) -> list[dict[str, Any]]:
    """Runs `script FOLDER *arguments`; returns the `process-N.json` that each process wrote into the folder."""
    folder.mkdir()
    others = os.environ.get("PYTHONPATH")  # where packages may lie that are installed nowhere
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent / "src"), str(TESTS), *filter(None, [others])]),
        "PYTHONWARNINGS": "ignore",
        "TETHER_HOME": str(folder / "home"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    launcher = [sys.executable, *(torchrun if num_processes > 1 else [])]
    command = [*launcher, str(TESTS / "support" / "scripts" / script), str(folder), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-8000:]
    return [json.loads(path.read_text()) for path in sorted(folder.glob("process-*.json"))]
