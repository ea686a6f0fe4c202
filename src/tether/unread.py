"""Options that nothing in a run would read: refused by name, so that none is accepted and without effect.

Knows options and whether the training rows are streamed; what single values may be is the business of `config`.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, NamedTuple

from tether.errors import ConfigurationError

if TYPE_CHECKING:
    from tether.config import DPOConfig


class _Unread(NamedTuple):
    """An option that would have no effect: its name, why, what to write, and whether that is so in a run."""

    option: str
    why: str
    instead: str
    applies: bool


def refuse_unread(args: DPOConfig, *, streams: bool) -> None:
    """Refuses what a run was asked for and would not do.

    Args:
        args: The run's options.
        streams: Whether the training rows are a stream.

    Raises:
        ConfigurationError: Names the first such option.
    """
    for found in (*_without_what_reads_them(args), *_without_even_batches(args, streams=streams)):
        if found.applies:
            value = getattr(args, found.option)
            raise ConfigurationError(
                problem=f"`{found.option}={getattr(value, 'value', value)!r}`.",
                details=found.why,
                instead=found.instead,
            )


def _without_what_reads_them(args: DPOConfig) -> list[_Unread]:
    default = {entry.name: entry.default for entry in fields(args)}
    never_moves = "The reference does not move: `sync_ref_model` is False."
    sync = "Set `sync_ref_model=True`, or leave `{}` out."
    found = [
        _Unread(name, never_moves, sync.format(name), not args.sync_ref_model and getattr(args, name) != default[name])
        for name in ("ref_model_mixup_alpha", "ref_model_sync_steps")
    ]
    precomputes = args.precompute_ref_log_probs
    return [
        *found,
        _Unread(
            "precompute_ref_batch_size",
            "No pass scores the rows before training: `precompute_ref_log_probs` is False.",
            "Set `precompute_ref_log_probs=True`, or leave it out.",
            args.precompute_ref_batch_size is not None and not precomputes,
        ),
        _Unread(
            "padding_free",
            "NEFTune's noise depends on the length of a row, so each sequence has a row of its own, which is padded.",
            "Leave out `padding_free` or `neftune_noise_alpha`.",
            args.padding_free and args.neftune_noise_alpha is not None,
        ),
        _Unread(
            "label_smoothing_factor",
            "It smooths the targets of a cross-entropy over tokens, which no loss of pairs is.",
            "Write `label_smoothing=...`, the probability that a preference label is flipped, or leave it out.",
            bool(args.label_smoothing_factor),
        ),
        _Unread(
            "save_strategy",
            "A checkpoint is written when an evaluation is better than those before, and nothing is evaluated.",
            "Set `eval_strategy` too, or `save_strategy='steps'`.",
            args.save_strategy == "best" and args.eval_strategy == "no",
        ),
    ]


def _without_even_batches(args: DPOConfig, *, streams: bool) -> list[_Unread]:
    """Micro-batches of similar length, or of so many tokens, are planned over a whole set that is known."""
    budget, groups = args.max_tokens_per_micro_batch is not None, args.train_sampling_strategy == "group_by_length"
    unknown = "The rows of a stream are only known when they are read; what goes together is planned before."
    as_set = "Pass a `datasets.Dataset` or a list of dicts as `train_dataset`, or leave it out."
    return [
        _Unread("max_tokens_per_micro_batch", unknown, as_set, budget and streams),
        _Unread("train_sampling_strategy", unknown, as_set, groups and streams),
        _Unread(
            "train_sampling_strategy",
            "With `max_tokens_per_micro_batch`, micro-batches hold pairs of similar length, in random order.",
            "Leave one of the two out.",
            budget and args.train_sampling_strategy == "sequential",
        ),
        _Unread(
            "dataloader_drop_last",
            "Micro-batches of similar length are of different sizes, and every pair is in one of them.",
            "Leave it out, or `train_sampling_strategy` and `max_tokens_per_micro_batch`.",
            bool(args.dataloader_drop_last) and (budget or groups),
        ),
    ]
