"""References of every kind and the policies they belong to, for the contract suite and the tests of single kinds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

from support.tiny import tiny_model
from tether.reference import (
    BemaReference,
    ExplicitReference,
    ImplicitReference,
    Placement,
    PrecomputedReference,
    Reference,
    SynchronizedReference,
)
from tether.reference.free import FreeReference
from tether.reference.given import GivenReference
from tether.store import LogProbStore, content_key
from tether.testing import ReferenceContract
from tether.types import PairBatch, Response

CLOSE = {"atol": 5e-6, "rtol": 1e-6}


def draw(seed: int, count: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(5, 256, (count,), generator=generator).tolist())


def response(prompt: tuple[int, ...], tokens: tuple[int, ...]) -> Response:
    return Response(prompt, tokens, content_key(prompt, tokens))


FIRST, SECOND = draw(0, 12), draw(1, 3)
BATCH = PairBatch.of_pairs(
    [
        (response(FIRST, draw(2, 13)), response(FIRST, draw(3, 5))),
        (response(FIRST, draw(4, 1)), response(FIRST, draw(2, 13))),
        (response(SECOND, draw(6, 7)), response(SECOND, draw(7, 2))),
    ]
)

# The same pairs, each response with the sum that a row would bring for it.
BATCH_WITH_SUMS = replace(BATCH, reference_sums=tuple(-1.25 * length for length in BATCH.response_lengths))

# -------------------------------------------------------------------------------------------------- policies


def dropping_gpt2(**options: Any) -> Any:
    """GPT-2 with dropout as modules and, in its attention, as a number."""
    return tiny_model("gpt2", resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3, **options)


def dropping_llama(**options: Any) -> Any:
    return tiny_model("llama", attention_dropout=0.3, **options)


def adapted(model: Any, config: Any, seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def partly_frozen() -> Any:
    policy = dropping_gpt2()
    policy.transformer.wte.requires_grad_(False)
    policy.transformer.h[0].requires_grad_(False)
    return policy


LORA = {"r": 4, "lora_dropout": 0.3, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
LLAMA_LORA = {"r": 4, "lora_dropout": 0.3, "target_modules": ["q_proj", "down_proj"]}


def lora(**options: Any) -> Any:
    return adapted(dropping_gpt2(), LoraConfig(**LORA, **options))


def llama_lora(**options: Any) -> Any:
    return adapted(dropping_llama(), LoraConfig(**LLAMA_LORA | options))


def half_frozen_lora() -> Any:
    """PEFT would make both factors trainable when it switches the adapter back on."""
    policy = lora()
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    return policy


def ia3() -> Any:
    return adapted(dropping_llama(), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))


def prompt_tuning() -> Any:
    return adapted(dropping_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


# ----------------------------------------------------------------------------------------------------- kinds


@dataclass(frozen=True)
class Kind:
    """A policy, its reference, and the model that the reference is meant to be (by default the policy)."""

    policy: Callable[[], Any]
    reference: Callable[[Any, Path], Reference]
    meant: Callable[[Any], Any] = lambda policy: policy
    tolerance: tuple[float, float] = (1e-5, 5e-5)  # rounding in fp32: 4e-6 and 2e-5 under `OtherRounding(3)`
    batch: PairBatch = BATCH


HALF = Placement(dtype=torch.bfloat16)


def explicit(policy: Any, folder: Path | None = None) -> Reference:
    return ExplicitReference.of_policy(policy)


def implicit(policy: Any, folder: Path | None = None) -> Reference:
    return ImplicitReference(policy)


def synchronized(alpha: float = 0.5, **options: Any) -> Callable[[Any, Path], Reference]:
    def build(policy: Any, folder: Path) -> Reference:
        return SynchronizedReference(
            ExplicitReference.of_policy(policy, **options), lambda: policy, alpha=alpha, every=2
        )

    return build


def synchronized_adapter(alpha: float = 0.5, **options: Any) -> Callable[[Any, Path], Reference]:
    def build(policy: Any, folder: Path) -> Reference:
        source = ImplicitReference(policy, moves=True)
        return SynchronizedReference(source, lambda: policy, alpha=alpha, every=2, **options)

    return build


def other_model() -> Any:
    return dropping_gpt2(seed=1)


def followed(policy: Any, folder: Path) -> Reference:
    return BemaReference(ExplicitReference.of_policy(policy))


def after_taking(policy: Any, folder: Path) -> Reference:
    """One that was given the weights of another model, as an average would be."""
    reference = BemaReference(ExplicitReference.of_policy(policy))
    reference.take(dict(other_model().named_parameters()))
    return reference


class Certain(nn.Module):
    """A model to which every token is certain: what a reference that says 0 is meant to be."""

    def __init__(self) -> None:
        super().__init__()
        self.certainty = nn.Parameter(torch.tensor(1e4))

    def forward(self, input_ids: Any, **options: Any) -> Any:
        following = nn.functional.one_hot(input_ids.roll(-1, -1), 256)
        return SimpleNamespace(logits=self.certainty * following)


class Told(nn.Module):
    """A model that gives the first token of each response of a batch its sum, and is certain of all others."""

    def __init__(self, batch: PairBatch) -> None:
        super().__init__()
        self.certainty = nn.Parameter(torch.tensor(1e4))
        prompts = batch.prompt_ids.split(list(batch.prompt_lengths))
        self.sums = {}
        for number, tokens in enumerate(batch.response_ids.split(list(batch.response_lengths))):
            prompt = prompts[batch.response_group[number]].tolist()
            self.sums[*prompt, *tokens.tolist()] = len(prompt), batch.reference_sums[number]

    def forward(self, input_ids: Any, **options: Any) -> Any:
        (ids,) = input_ids.tolist()
        start, total = self.sums[tuple(ids)]
        logits = self.certainty * nn.functional.one_hot(input_ids.roll(-1, -1), 256)
        logits[0, start - 1] = math.log(-math.expm1(total) / 255)  # what is left, for all other tokens alike
        logits[0, start - 1, ids[start]] = total
        return SimpleNamespace(logits=logits)


SOURCES: dict[str, Kind] = {
    "explicit": Kind(dropping_gpt2, explicit),
    "explicit, partly frozen": Kind(partly_frozen, explicit),
    "explicit, tied embeddings": Kind(lambda: tiny_model(tie_word_embeddings=True), explicit),
    "explicit, padded layout": Kind(lambda: tiny_model("mamba"), explicit, tolerance=(2e-5, 2e-5)),
    "explicit, bfloat16 weights": Kind(
        lambda: tiny_model("llama", dtype=torch.bfloat16), explicit, tolerance=(0.05, 0.5)
    ),
    "explicit, in `ref_dtype` bfloat16": Kind(
        dropping_gpt2,
        lambda policy, folder: ExplicitReference.of_policy(policy, HALF),
        tolerance=(0.05, 0.5),
    ),
    "explicit, under autocast": Kind(
        dropping_gpt2,
        lambda policy, folder: ExplicitReference.of_policy(policy, Placement(autocast_dtype=torch.bfloat16)),
        tolerance=(0.05, 0.5),
    ),
    "explicit, other model": Kind(
        dropping_gpt2,
        lambda policy, folder: ExplicitReference.of_other_model(other_model(), policy),
        meant=lambda policy: other_model(),
    ),
    "implicit, fresh LoRA": Kind(lora, implicit),
    "implicit, continued LoRA": Kind(lambda: lora(init_lora_weights=False), implicit),
    "implicit, LoRA with a frozen factor": Kind(half_frozen_lora, implicit),
    "implicit, LoRA with biases": Kind(lambda: lora(bias="all"), implicit),
    "implicit, LoRA with a trained head": Kind(lambda: llama_lora(modules_to_save=["lm_head"]), implicit),
    "implicit, LoRA on the embedding": Kind(lambda: llama_lora(target_modules=["embed_tokens", "q_proj"]), implicit),
    "implicit, DoRA": Kind(lambda: llama_lora(use_dora=True), implicit),
    "implicit, PiSSA": Kind(lambda: llama_lora(init_lora_weights="pissa"), implicit),
    "implicit, IA3": Kind(ia3, implicit),
    "implicit, prompt tuning": Kind(prompt_tuning, implicit),
    "synchronized": Kind(dropping_gpt2, synchronized()),
    "synchronized, hard": Kind(dropping_gpt2, synchronized(alpha=1.0)),
    "synchronized, LoRA": Kind(lora, synchronized_adapter()),
    "synchronized, LoRA truncated": Kind(lora, synchronized_adapter(max_rank=5)),
    "synchronized, LoRA hard": Kind(lora, synchronized_adapter(alpha=1.0)),
    "synchronized, LoRA continued": Kind(lambda: lora(init_lora_weights=False), synchronized_adapter()),
    "synchronized, LoRA with a trained head": Kind(
        lambda: llama_lora(modules_to_save=["lm_head"]), synchronized_adapter()
    ),
    "synchronized, DoRA": Kind(lambda: llama_lora(use_dora=True), synchronized_adapter()),
    "synchronized, IA3": Kind(ia3, synchronized_adapter()),
    "synchronized, in bfloat16": Kind(dropping_gpt2, synchronized(placement=HALF), tolerance=(0.05, 0.5)),
    "bema": Kind(dropping_gpt2, followed),
    "bema, after taking weights": Kind(dropping_gpt2, after_taking, meant=lambda policy: other_model()),
    "none": Kind(dropping_gpt2, lambda policy, folder: FreeReference(), meant=lambda policy: Certain()),
    "given by the rows": Kind(
        dropping_gpt2,
        lambda policy, folder: GivenReference("digest of the rows"),
        meant=lambda policy: Told(BATCH_WITH_SUMS),
        batch=BATCH_WITH_SUMS,
    ),
}
_NOT_STORED = ("synchronized", "bema", "none", "given")


def precomputed(kind: Kind) -> Kind:
    """The same reference with its answers on disk, its weights given up once they are there."""

    def build(policy: Any, folder: Path) -> Reference:
        return PrecomputedReference(LogProbStore(folder / "store.sqlite"), kind.reference(policy, folder))

    return Kind(kind.policy, build, kind.meant, kind.tolerance)


KINDS: dict[str, Kind] = {
    **SOURCES,
    **{
        f"precomputed over {name}": precomputed(kind)
        for name, kind in SOURCES.items()
        if not name.startswith(_NOT_STORED)
    },
    "precomputed over the policy itself": precomputed(
        Kind(dropping_gpt2, lambda policy, folder: ExplicitReference.before_training(policy))
    ),
}


class OfKind(ReferenceContract):
    """The contract for one of the kinds above."""

    kind: Kind

    def make_policy(self) -> Any:
        return self.kind.policy()

    def make_reference(self, policy: Any, folder: Path) -> Reference:
        return self.kind.reference(policy, folder)

    def meant_model(self, policy: Any) -> Any:
        return self.kind.meant(policy)

    def make_batch(self, policy: Any) -> PairBatch:
        return self.kind.batch

    @property
    def tolerance(self) -> tuple[float, float]:  # type: ignore[override]
        return self.kind.tolerance


def train(policy: nn.Module) -> None:
    """What training does to a policy: every trainable tensor moves, far enough to be seen."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
