"""Policy and reference run in one precision, whoever chose it; evaluation in another leaves every weight alone."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import AutocastKwargs
from peft import LoraConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from transformers import EvalPrediction

from support.observe import bits, same_bits
from support.runs import as_dataset, curve, make_trainer, steps, trained
from support.tiny import tiny_model, tiny_pairs
from tether import DPOConfig, DPOTrainer
from tether.distributed import autocast_dtype, device_of
from tether.errors import ConfigurationError, DriftError
from tether.reference import base
from tether.types import PairBatch, Response, ResponseLogProbs

# ------------------------------------------------------------------------------------------------- while it trains


def lora() -> dict[str, Any]:
    return {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])}


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_the_launchers_precision_is_the_references_too(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`accelerate launch --mixed_precision bf16` sets a variable, and no option."""

    def run(name: str, **options: Any) -> DPOTrainer:
        more = lora() if kind == "adapter" else {}
        return trained(tmp_path / name, use_cpu=True, eval_dataset=as_dataset(tiny_pairs(4, seed=1)), **more | options)

    by_option = run("option", bf16=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    launched = run("launched")
    assert launched.args.bf16 is False and launched.reference.identity.compute_dtype == "bfloat16"
    assert steps(launched)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert steps(launched)[0]["reference/initial_gap"] == 0
    assert curve(launched) == curve(by_option)
    assert launched.evaluate()["eval_loss"] == by_option.evaluate()["eval_loss"]


@pytest.mark.parametrize("precision", ["fp16", "fp8"])
def test_a_launchers_precision_in_which_reference_and_policy_would_differ_is_refused(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    with pytest.raises(ConfigurationError, match=f"--mixed_precision {precision}"):
        DPOConfig(str(tmp_path), use_cpu=True)
    assert DPOConfig(str(tmp_path), use_cpu=True, bf16=True).mixed_precision == "bf16"


def test_autocast_is_asked_of_the_accelerator() -> None:
    def dtype_of(**options: Any) -> torch.dtype | None:
        AcceleratorState._reset_state(reset_partial_state=True)
        return autocast_dtype(Accelerator(cpu=True, **options))

    assert dtype_of() is None
    assert dtype_of(mixed_precision="bf16") == torch.bfloat16
    assert dtype_of(mixed_precision="bf16", kwargs_handlers=[AutocastKwargs(enabled=False)]) is None
    with torch.autocast("cpu", torch.bfloat16):  # of whoever builds the trainer
        assert dtype_of() is None


def with_a_shard_of_cuda_on_the_host(model: nn.Module) -> nn.Module:
    """As FSDP2 with CPU offload holds it between two passes; without a card, nobody can run it."""
    name, weight = next(iter(model.named_parameters()))
    mesh = DeviceMesh("cuda", [0], _init_backend=False, _rank=0)
    spec = DTensorSpec(mesh, (Shard(0),), TensorMeta(weight.shape, weight.stride(), weight.dtype))
    owner, _, attribute = name.rpartition(".")
    sharded = DTensor(weight.detach(), spec, requires_grad=False)
    setattr(model.get_submodule(owner), attribute, nn.Parameter(sharded, requires_grad=False))
    return model


def test_offloaded_shards_do_not_decide_in_what_precision_a_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_a_shard_of_cuda_on_the_host(tiny_model())
    assert next(model.parameters()).device.type == "cpu"
    assert device_of(model).type == "cuda" and device_of(tiny_model()).type == "cpu"
    asked: list[str] = []

    class Noted(torch.autocast):
        def __init__(self, device_type: str, dtype: torch.dtype) -> None:
            asked.append(device_type)
            super().__init__("cpu", dtype)

    batch = PairBatch.of_pairs([(Response((3, 4), (5, 6)), Response((3, 4), (7,)))])
    found = ResponseLogProbs(torch.zeros(3), torch.tensor([0, 2, 3]))
    monkeypatch.setattr(torch, "autocast", Noted)
    monkeypatch.setattr(base, "score", lambda model, batch: found)
    base.score_without_gradient(model, batch, torch.bfloat16)
    assert asked == ["cuda"]


@pytest.mark.parametrize(("section", "expected"), [("bf16", None), ("torch_autocast", torch.bfloat16)])
def test_autocast_under_deepspeed_is_its_engines(section: str, expected: torch.dtype | None) -> None:
    """With `bf16` the weights are in it, and the engine switches off any autocast but its own."""
    pytest.importorskip("deepspeed")
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    config = {section: {"enabled": True, "dtype": "bf16"}}
    fake = SimpleNamespace(
        state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=config)),
        device=accelerator.device,
        autocast=accelerator.autocast,
    )
    assert autocast_dtype(fake) == expected


# ------------------------------------------------------------------------------------------------ while it evaluates

DTYPES = {"bf16_full_eval": torch.bfloat16, "fp16_full_eval": torch.float16}


def partly_frozen() -> nn.Module:
    model = tiny_model()
    model.get_input_embeddings().requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    return model


KINDS: dict[str, Any] = {
    "full": lambda: {},
    "adapter": lora,
    "partly frozen": lambda: {"model": partly_frozen()},
    "precomputed": lambda: {"precompute_ref_log_probs": True},
    "synchronized": lambda: {"sync_ref_model": True, "ref_model_sync_steps": 2},
    "another model": lambda: {"ref_model": tiny_model(seed=5)},
}


class Failing:
    """A `compute_metrics` that fails when it is told to."""

    fails = False

    def __call__(self, given: EvalPrediction) -> dict[str, float]:
        if self.fails:
            raise RuntimeError("in the middle of an evaluation")
        return {}


def evaluating(folder: Path, kind: str = "full", **options: Any) -> DPOTrainer:
    return make_trainer(folder, eval_dataset=as_dataset(tiny_pairs(6, seed=1)), **KINDS[kind]() | options)


@pytest.mark.parametrize("option", DTYPES)
def test_evaluation_in_half_precision_is_as_near_to_fp32_as_a_model_in_it(option: str, tmp_path: Path) -> None:
    exact, asked = (evaluating(tmp_path / str(name), **{name: True} if name else {}) for name in (None, option))
    naive = tiny_model(dtype=DTYPES[option])
    rows = tiny_pairs(4, seed=2)
    fp32, found = (trainer.predict(rows) for trainer in (exact, asked))
    ids = torch.from_numpy(found.label_ids)
    with torch.no_grad():
        rounded = naive(input_ids=ids).logits.float()
    real = ids.ne(exact._pad_token_id)
    expected, given = torch.from_numpy(fp32.predictions)[real], torch.from_numpy(found.predictions)[real]
    error, naive_error = ((side - expected).abs().mean() for side in (given, rounded[real]))
    assert 0.2 * naive_error < error < 1.2 * naive_error  # in that precision, and no worse
    assert torch.equal(given, given.to(DTYPES[option]).float())


@pytest.mark.parametrize(
    ("kind", "option"), [*((kind, "bf16_full_eval") for kind in KINDS), ("partly frozen", "fp16_full_eval")]
)
def test_evaluation_in_half_precision_leaves_weights_reference_and_training_alone(
    kind: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, asked = evaluating(tmp_path / "plain", kind), evaluating(tmp_path / "asked", kind, **{option: True})
    before = bits(asked.model)
    asked.evaluate()
    assert same_bits(bits(asked.model), before)
    plain.train()
    asked.train()
    assert curve(asked) == curve(plain) and same_bits(bits(asked.model), bits(plain.model))
    answers = said_in_evaluation(asked), said_in_evaluation(plain)
    assert all(torch.equal(one, other) for one, other in zip(*answers, strict=True))
    asked._reference_run.watch.check_drift()
    asked.predict(tiny_pairs(6, seed=1))
    monkeypatch.setattr("tether.reference.watch.check_initial_gap", lambda *_: None)  # by now it is another policy
    asked.train()  # the optimizer's state is keyed by the parameters
    plain.train()
    assert same_bits(bits(asked.model), bits(plain.model))
    assert getattr(asked.args, option) is True


def said_in_evaluation(trainer: DPOTrainer) -> list[Tensor]:
    """What the reference answers, batch by batch, while the policy is evaluated."""
    found: list[Tensor] = []
    answer = trainer.reference.log_probs

    def listening(batch: Any) -> Any:
        found.append((said := answer(batch)).values.clone())
        return said

    trainer.reference.log_probs = listening  # type: ignore[method-assign]
    trainer.evaluate()
    del trainer.reference.log_probs
    return found


def test_evaluation_in_half_precision_that_fails_leaves_weights_and_options_alone(tmp_path: Path) -> None:
    metrics = Failing()
    trainer = evaluating(tmp_path, "adapter", bf16_full_eval=True, compute_metrics=metrics)
    trainer.train()
    before, metrics.fails = bits(trainer.model), True
    with pytest.raises(RuntimeError, match="in the middle"):
        trainer.evaluate()
    assert same_bits(bits(trainer.model), before) and trainer.args.bf16_full_eval is True


def test_drift_is_found_with_evaluation_in_half_precision(tmp_path: Path) -> None:
    trainer = evaluating(tmp_path, "adapter", bf16_full_eval=True)
    trainer.train()
    trainer.evaluate()
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight.mul_(1.01)
    with pytest.raises(DriftError):
        trainer._reference_run.watch.check_drift()


def test_evaluation_in_another_half_precision_than_training_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="mixed precision is bf16"):
        DPOConfig(str(tmp_path), use_cpu=True, bf16=True, fp16_full_eval=True)
    assert DPOConfig(str(tmp_path), use_cpu=True, bf16=True, bf16_full_eval=True).bf16_full_eval
