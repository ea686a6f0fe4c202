"""Scoring and training on a CUDA device: the numbers of a plain forward, and those of a run on a CPU."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from support.kinds import BATCH
from support.runs import curve, trained
from support.tiny import naive_log_probs, tiny_model
from tether.scoring import score

pytestmark = pytest.mark.gpu

# Head sizes that kernels for half precision take; the windows are shorter than the rows.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"hidden": 256},
    "mistral": {"hidden": 256, "sliding_window": 8},
    "gemma2": {"hidden": 256},
    "gpt2": {"hidden": 256},
}
REFERENCES: dict[str, dict[str, Any]] = {
    "explicit": {},
    "implicit": {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])},
    "precomputed": {"precompute_ref_log_probs": True},
    "synchronized": {"sync_ref_model": True, "ref_model_sync_steps": 1},
}


def plainly(model: Any) -> Tensor:
    return torch.cat([naive_log_probs(model, each.prompt_ids, each.token_ids) for each in BATCH.responses()])


def errors(found: Tensor, model: Any, exact: list[Tensor]) -> list[float]:
    """Of the values, and of the gradient of the head."""
    (gradient,) = torch.autograd.grad(found.sum(), model.get_output_embeddings().weight)
    pairs = zip((found, gradient), exact, strict=True)
    return [float((ours.detach().cpu().double() - theirs).norm() / theirs.norm()) for ours, theirs in pairs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_no_further_from_exact_than_a_plain_forward(family: str, dtype: torch.dtype) -> None:
    model: Any = tiny_model(family, dtype=dtype, **FAMILIES[family]).requires_grad_(True)
    wide: Any = tiny_model(family, dtype=dtype, **FAMILIES[family]).double().requires_grad_(True)
    values = plainly(wide)
    exact = [values.detach(), *torch.autograd.grad(values.sum(), wide.get_output_embeddings().weight)]
    model = model.to("cuda")
    ours = errors(score(model, BATCH).values, model, exact)
    naive = errors(plainly(model), model, exact)
    assert all(own <= 2 * other + 1e-6 for own, other in zip(ours, naive, strict=True)), (ours, naive)


@pytest.mark.parametrize("kind", REFERENCES)
def test_a_run_is_that_on_a_cpu(kind: str, tmp_path: Path) -> None:
    runs = {
        use_cpu: trained(tmp_path / str(use_cpu), use_cpu=use_cpu, bf16=False, max_steps=4, **REFERENCES[kind])
        for use_cpu in (True, False)
    }
    assert runs[False].model.device.type == "cuda"
    assert curve(runs[False])[0] == pytest.approx(math.log(2), abs=1e-4)
    assert curve(runs[False]) == pytest.approx(curve(runs[True]), abs=1e-3)


def test_a_run_in_bfloat16_begins_where_the_reference_is(tmp_path: Path) -> None:
    trainer = trained(tmp_path, tiny_model(dtype=torch.bfloat16), bf16=True)
    assert trainer.state.log_history[0]["reference/initial_gap"] < 1e-3
    assert curve(trainer)[0] == pytest.approx(math.log(2), abs=1e-3)
