"""How far two scorings of the same tokens may be apart: by rounding, and by faults that must not pass for rounding.

Sets the thresholds of `tether.reference.watch`. Small random models with sharp predictions (the tests'
own), several families, widths and lengths; one core, a few minutes.

    python benchmarks/bench_numerics.py
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import write_results
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from support.tiny import tiny_model
from tether.reference import ExplicitReference, ImplicitReference, Placement
from tether.scoring import score
from tether.scoring.evaluation import evaluation_mode
from tether.types import PairBatch, Response


class Model(NamedTuple):
    family: str
    hidden: int
    layers: int
    length: int
    vocab_size: int = 1000


MODELS = [
    *(Model(family, 64, 2, length) for family in ("llama", "gemma2", "gpt2") for length in (16, 128)),
    Model("llama", 64, 2, 1024),
    Model("mixtral", 64, 2, 128),
    Model("llama", 256, 4, 128, 8000),
    Model("gemma2", 256, 4, 128, 8000),
    Model("llama", 512, 8, 256, 8000),
    Model("gpt2", 512, 8, 128, 8000),
]
DTYPES = {
    "float32": (torch.float32, None),
    "float16": (torch.float16, None),
    "bfloat16": (torch.bfloat16, None),
    "float32, bfloat16 autocast": (torch.float32, torch.bfloat16),
}


class Scorer(NamedTuple):
    """Scores as references do: no gradient, no dropout, under training's autocast."""

    batch: PairBatch
    autocast_dtype: torch.dtype | None

    def __call__(self, model: nn.Module, layout: Any = "auto", batch: PairBatch | None = None) -> Tensor:
        with evaluation_mode(model):
            return self.in_its_mode(model, layout, batch)

    def in_its_mode(self, model: nn.Module, layout: Any = "auto", batch: PairBatch | None = None) -> Tensor:
        autocast = torch.autocast(model.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None)
        with torch.no_grad(), autocast:
            return score(model, batch or self.batch, layout=layout).values.cpu()


# --- the same reference, scored in other ways: rounding ----------------------------------------------------------


def copy_of(model: Any, scorer: Scorer) -> Tensor:
    return (
        ExplicitReference.of_policy(model, Placement(autocast_dtype=scorer.autocast_dtype))
        .log_probs(scorer.batch)
        .values
    )


def adapter_off(model: Any, scorer: Scorer) -> Tensor:
    policy = adapted(copy.deepcopy(model))
    return ImplicitReference(policy, autocast_dtype=scorer.autocast_dtype).log_probs(scorer.batch).values


def padded(model: Any, scorer: Scorer) -> Tensor:
    return scorer(model, "padded")


def other_batches(model: Any, scorer: Scorer) -> Tensor:
    """Each pair in a batch of its own, as another batch size would have stored it."""
    return torch.cat([scorer(model, batch=batch) for batch in one_by_one(scorer.batch)])


def eager_attention(model: Any, scorer: Scorer) -> Tensor:
    other = copy.deepcopy(model)
    other.set_attn_implementation("eager")
    return scorer(other, "padded")


def in_bfloat16(model: Any, scorer: Scorer) -> Tensor:
    """A reference held in bfloat16 (`ref_dtype`), beside a policy in another dtype."""
    return ExplicitReference.of_policy(model, Placement(dtype=torch.bfloat16)).log_probs(scorer.batch).values


ROUNDING: dict[str, Callable[[Any, Scorer], Tensor]] = {
    "explicit copy": copy_of,
    "adapter off": adapter_off,
    "padded layout": padded,
    "other batches": other_batches,
    "eager attention": eager_attention,
    "weights in bfloat16": in_bfloat16,
}

# --- another reference -------------------------------------------------------------------------------------------


def disturbed(size: float) -> Callable[[Any, Scorer], Tensor]:
    """Every weight off by a relative error of this size."""

    def measure(model: Any, scorer: Scorer) -> Tensor:
        other = copy.deepcopy(model)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in other.parameters():
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
                parameter.copy_(parameter.float() * (1 + size * noise))
        return scorer(other)

    return measure


def small_adapter(model: Any, scorer: Scorer) -> Tensor:
    """An adapter whose delta is 1% of the weight it sits on, by Frobenius norm."""
    policy = adapted(copy.deepcopy(model))
    generator = torch.Generator().manual_seed(1)
    for layer in policy.modules():
        for name, factor in getattr(layer, "lora_B", {}).items():
            factor.weight.data = torch.randn(factor.weight.shape, generator=generator).to(factor.weight)
            delta, base = layer.get_delta_weight(name).float().norm(), layer.get_base_layer().weight.float().norm()
            factor.weight.data *= 0.01 * base / delta
    return scorer(policy)


def other_rope(model: Any, scorer: Scorer) -> Tensor | None:
    rope = getattr(model.config, "rope_parameters", None)
    if not rope:
        return None
    config = copy.deepcopy(model.config)
    kinds = [config.rope_parameters] if "rope_theta" in config.rope_parameters else config.rope_parameters.values()
    for kind in kinds:
        kind["rope_theta"] *= 5
    other = type(model)(config).to(model.device, model.dtype)
    rotary = {name: b.to(model.device) for name, b in type(model)(config).named_buffers() if "inv_freq" in name}
    other.load_state_dict(model.state_dict())
    for name, buffer in rotary.items():  # `.to` rounded them
        other.get_buffer(name).data = buffer
    return scorer(other)


def rounded_rotary(model: Any, scorer: Scorer) -> Tensor | None:
    """Rotary frequencies rounded to bfloat16, as `model.to(bfloat16)` leaves them."""
    other = copy.deepcopy(model)
    names = [name for name, _ in other.named_buffers() if name.endswith("inv_freq")]
    for name in names:
        other.get_buffer(name).data = other.get_buffer(name).to(torch.bfloat16).float()
    return scorer(other) if names else None


def resized_embedding(model: Any, scorer: Scorer) -> Tensor:
    """Eight more rows in embedding and head, drawn as transformers draws them."""
    other = copy.deepcopy(model)
    torch.manual_seed(0)
    other.resize_token_embeddings(model.config.vocab_size + 8)
    return scorer(other)


def dropping(model: Any, scorer: Scorer) -> Tensor:
    """One tenth dropped wherever the family can drop."""
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
        for name in ("attention_dropout", "attn_dropout"):
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.1)
    torch.manual_seed(0)
    return scorer.in_its_mode(other.train(), "padded")


def other_template(model: Any, scorer: Scorer) -> Tensor:
    """One token more at the end of every prompt."""
    return scorer(model, batch=rebuilt(scorer.batch, lambda prompt: (*prompt, 7)))


FAULTS: dict[str, Callable[[Any, Scorer], Tensor | None]] = {
    "weights off by 0.1%": disturbed(1e-3),
    "weights off by 1%": disturbed(1e-2),
    "an adapter of 1%": small_adapter,
    "rope theta times 5": other_rope,
    "rotary frequencies in bfloat16": rounded_rotary,
    "8 rows more in the embedding": resized_embedding,
    "dropout of 0.1": dropping,
    "one token more in the prompt": other_template,
}

# --- measuring ---------------------------------------------------------------------------------------------------


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for model in MODELS:
        start = time.perf_counter()
        rows += measured(model)
        print(f"{model}: {time.perf_counter() - start:.0f} s", flush=True)
    print(write_results("numerics", summary(rows), "cpu"))


def measured(
    shape: Model, dtypes: dict[str, tuple[torch.dtype, torch.dtype | None]] = DTYPES, device: str = "cpu"
) -> Iterator[dict[str, Any]]:
    """Mean and largest difference per token to the plain scoring, for every dtype and every other way."""
    for name, (dtype, autocast_dtype) in dtypes.items():
        if dtype == torch.float16 and shape.hidden > 64:
            continue  # a CPU multiplies it without help, a hundred times slower
        model = make_model(shape, dtype).to(device)
        scorer = Scorer(make_batch(shape), autocast_dtype)
        plain = scorer(model)
        for kind, ways in (("rounding", ROUNDING), ("fault", FAULTS)):
            for way, scored in ways.items():
                other = scored(model, scorer)
                if other is None or (way == "weights in bfloat16" and name != "float32"):
                    continue
                gap = (other - plain).abs()
                yield {
                    "model": "-".join(map(str, shape)),
                    "dtype": name,
                    "kind": kind,
                    "way": way,
                    "mean": float(gap.mean()),
                    "largest": float(gap.max()),
                }


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every dtype and way: the extremes over the models, and whose they are."""
    found = []
    for key in dict.fromkeys((row["dtype"], row["kind"], row["way"]) for row in rows):
        of_key = [row for row in rows if (row["dtype"], row["kind"], row["way"]) == key]
        low, high = (pick(of_key, key=lambda row: row["mean"]) for pick in (min, max))
        found.append(
            dict(zip(("dtype", "kind", "way"), key, strict=True))
            | {"models": len(of_key)}
            | {"smallest_mean": low["mean"], "smallest_of": low["model"]}
            | {"largest_mean": high["mean"], "largest_of": high["model"]}
            | {f"{name}_single": pick(row["largest"] for row in of_key) for name, pick in PICKS.items()}
        )
    return found


PICKS: dict[str, Callable[..., float]] = {"smallest": min, "largest": max}


def make_model(shape: Model, dtype: torch.dtype) -> Any:
    positions = "n_positions" if shape.family == "gpt2" else "max_position_embeddings"
    model = tiny_model(
        shape.family,
        hidden=shape.hidden,
        layers=shape.layers,
        vocab_size=shape.vocab_size,
        dtype=dtype,
        **{positions: 2048},
    )
    return model.requires_grad_(True)


def make_batch(shape: Model) -> PairBatch:
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(5, shape.vocab_size, (max(1, count),), generator=generator).tolist())

    drawn = []
    for prompt_length, chosen, rejected in ((2, 2, 4), (4, 2, 3), (8, 8, 2)):
        prompt = ids(shape.length // prompt_length)
        drawn.append(tuple(Response(prompt, ids(shape.length // length)) for length in (chosen, rejected)))
    return PairBatch.of_pairs(drawn)  # type: ignore[arg-type]


def rebuilt(batch: PairBatch, change: Callable[[tuple[int, ...]], tuple[int, ...]]) -> PairBatch:
    return PairBatch.of_pairs(
        [tuple(r._replace(prompt_ids=change(r.prompt_ids)) for r in pair) for pair in pairs(batch)]
    )


def one_by_one(batch: PairBatch) -> list[PairBatch]:
    return [PairBatch.of_pairs([pair]) for pair in pairs(batch)]


def pairs(batch: PairBatch) -> list[tuple[Response, Response]]:
    prompts = [tuple(ids.tolist()) for ids in batch.prompt_ids.split(list(batch.prompt_lengths))]
    tokens = [tuple(ids.tolist()) for ids in batch.response_ids.split(list(batch.response_lengths))]
    all_responses = [Response(prompts[g], t) for g, t in zip(batch.response_group, tokens, strict=True)]
    return [(all_responses[c], all_responses[r]) for c, r in zip(batch.chosen, batch.rejected, strict=True)]


def adapted(model: Any) -> Any:
    torch.manual_seed(0)
    targets = ["c_attn", "c_fc"] if model.config.model_type == "gpt2" else ["q_proj", "v_proj", "o_proj"]
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets))


if __name__ == "__main__":
    main()
