"""A run in a few lines: its start and its result."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import torch

from tether.cli.progress import HEADER, figures
from tether.cli.recipe import Recipe
from tether.reference import PrecomputedReference
from tether.trainer.dpo_trainer import DPOTrainer
from tether.trainer.samples import SAMPLES_FILE

_HARM = 0.01  # nats of held-out loss above its start that are no noise


def describe_start(trainer: DPOTrainer, recipe: Recipe) -> str:
    """The policy, the pairs and the reference of a run that is about to start."""
    trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in trainer.model.parameters())
    lines = [
        f"pairs      {_num_rows(trainer.train_dataset)} to train on, {_num_rows(trainer.eval_dataset)} held out",
        f"policy     {recipe.script.model}: {trained:,} of {total:,} weights train",
        f"reference  {describe_reference(trainer)}",
    ]
    return "\n".join(lines + describe_store(trainer))


def describe_end(
    trainer: DPOTrainer, metrics: Mapping[str, float], seconds: float, tokens_per_second: float | None
) -> str:
    """The result of a training run, and where it was saved.

    Args:
        trainer: After training.
        metrics: Of the held-out pairs, as returned by `evaluate`; empty without held-out pairs.
        seconds: Duration of the training.
        tokens_per_second: Of the training; None if not known.
    """
    state = trainer.state
    rows = [*_trained_rows(state.log_history), *_held_out_rows(state.log_history, metrics)]
    if rows:
        rows.insert(0, ("", HEADER))
    steps = _counted(state.global_step, "step")
    speed = f", {tokens_per_second:,.0f} tokens/s" if tokens_per_second is not None else ""
    lines = [
        "",
        f"{steps}, {state.epoch or 0:.2f} epochs, {seconds:.1f} s{speed}",
        *(f"{title:<20}{row}" for title, row in rows),
        *_describe_harm(trainer, metrics),
        f"reference  {describe_reference(trainer)}",
        f"           {_counted(trainer.reference.num_passes, 'pass', 'passes')}",
        *describe_store(trainer),
        *_describe_samples(trainer),
        f"saved      {trainer.args.output_dir}{_which_weights(trainer)}",
    ]
    return "\n".join(lines)


def _trained_rows(history: Sequence[Mapping[str, float]]) -> Iterator[tuple[str, str]]:
    """The first and the last log of training, with the steps that they are the mean of."""
    logged = [entry for entry in history if "loss" in entry]
    begins = dict(zip((entry["step"] for entry in logged), (0, *(entry["step"] for entry in logged)), strict=False))
    for entry in logged[:1] + logged[1:][-1:]:
        first, last = begins[entry["step"]] + 1, entry["step"]
        yield f"step {last}" if first == last else f"steps {first}-{last}", figures(entry, "")


def _held_out_rows(history: Sequence[Mapping[str, float]], metrics: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """The first evaluation of training, and the one of the weights that were saved."""
    first = next((entry for entry in history if "eval_loss" in entry), None)
    if first is not None and first["eval_loss"] != metrics.get("eval_loss"):
        yield f"held out at {first['step']}", figures(first, "eval_")
    if metrics:
        yield "held out at the end", figures(metrics, "eval_")


def _describe_harm(trainer: DPOTrainer, metrics: Mapping[str, float]) -> list[str]:
    """Says so if the held-out loss is clearly above that of the model before training, where that is known."""
    traits, loss, at_start = trainer.reference.traits, metrics.get("eval_loss", 0.0), math.log(2)
    is_known = trainer.args.loss_type == ["sigmoid"] and traits.means_policy and not traits.moves
    if not is_known or loss < at_start + _HARM:
        return []
    return [f"worse      the held-out loss, {loss:.4f}, is above {at_start:.4f}, where it was before training"]


def _describe_samples(trainer: DPOTrainer) -> list[str]:
    """The figures of the last answers to held-out prompts, and where the answers are; empty if none were asked for."""
    logged = [entry for entry in trainer.state.log_history if "samples/length" in entry]
    if not logged:
        return []
    longest, last = trainer.args.report_samples_max_new_tokens, logged[-1]
    figures = [f"{last['samples/length']:.0f} tokens (at most {longest}), {last['samples/ended']:.0%} ended"]
    for name in ("surprise", "kl"):
        if f"samples/{name}" in last:
            figures.append(f"{name} {round(last[f'samples/{name}'], 2) + 0.0:.2f}")
    return [f"samples    {', '.join(figures)} (nats a token): {trainer.args.output_dir}/{SAMPLES_FILE}"]


def _which_weights(trainer: DPOTrainer) -> str:
    """Which weights were saved, if not the last step's."""
    best = trainer.state.best_model_checkpoint
    return f": the weights of {Path(best).name}, the best" if trainer.args.load_best_model_at_end and best else ""


def describe_reference(trainer: DPOTrainer) -> str:
    """Its kind, its digest, and the size of its weights beside the policy."""
    reference, extra = trainer.reference, trainer.reference.extra_bytes
    return f"{reference.kind.name} {reference.identity.digest[:12]}, {extra / 1e6:,.1f} MB beside the policy"


def describe_store(trainer: DPOTrainer) -> list[str]:
    """The path of the store and how many responses were found in it; empty for a reference without a store."""
    reference = trainer.reference
    if not isinstance(reference, PrecomputedReference):
        return []
    counts = torch.tensor([reference.num_found, reference.num_computed], device=trainer.args.device)
    found, computed = trainer.accelerator.reduce(counts, reduction="sum").tolist()
    path = reference.store.path
    return [
        f"store      {path} ({_file_bytes(path) / 1e6:,.1f} MB)",
        f"           {found} responses found, {computed} computed",
    ]


def _counted(number: int, one: str, several: str = "") -> str:
    return f"{number} {one}" if number == 1 else f"{number} {several or one + 's'}"


def _num_rows(dataset: Any) -> str:
    if dataset is None:
        return "0"
    return str(len(dataset)) if isinstance(dataset, Sized) else "a stream"


def _file_bytes(path: Path) -> int:
    """The store with its write-ahead log."""
    return sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*") if part.is_file())
