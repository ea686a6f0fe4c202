"""Parts of a step on their own: attention over a packed row, and the head, each computed in every way at hand."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import harness
import torch
from stage import Rows, Stage
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tether.scoring.attention import packed_attention
from tether.scoring.groups import groups_of, lengths_tensor
from tether.scoring.head import token_log_probs

Run = Callable[[int], Tensor]


def attention(stage: Stage) -> None:
    """Forward and backward of one layer's attention by shape: each row for the first time, then again."""
    if stage.device == "cpu":
        stage.left_out["varlen, flex"] = "they need CUDA"
    for shape, batches in stage.each_shape(2 if stage.toy else 6, vocab_size=100):
        stage.measure(shape, partial(_attention, stage, shape, batches))


def _attention(stage: Stage, shape: str, batches: list[Rows]) -> dict[str, Any]:
    heads, size = (4, 16) if stage.toy else (32, 128)
    rows = [
        [(len(row["prompt_ids"]), [len(row["chosen_ids"]), len(row["rejected_ids"])]) for row in b] for b in batches
    ]
    lengths = [lengths_tensor(groups) for groups in rows]
    leaves = [
        [
            torch.randn(
                1, count, harness.num_tokens(batch), size, device=stage.device, dtype=stage.dtype
            ).requires_grad_()
            for count in (heads, heads // 4, heads // 4)
        ]
        for batch in batches
    ]
    ways: dict[str, Run] = {"pairwise": lambda item: _packed(leaves[item], lengths[item], "pairwise")}
    if stage.device == "cuda":
        masks = [_block_mask(row, "cuda") for row in lengths]
        flex = torch.compile(flex_attention)
        ways["varlen"] = lambda item: _packed(leaves[item], lengths[item], "varlen")
        ways["flex"] = lambda item: flex(*leaves[item], block_mask=masks[item], enable_gqa=True).transpose(1, 2)
    expected = ways["pairwise"](0)
    return {
        "shape": shape,
        "row": [leaf[0].shape[2] for leaf in leaves],
        **_timed(ways, len(batches), stage),
        "largest_difference": {way: float((run(0) - expected).detach().abs().max()) for way, run in ways.items()},
    }


def _packed(leaves: list[Tensor], lengths: Tensor, kernel: Any) -> Tensor:
    return packed_attention(*leaves, lengths, scale=leaves[0].shape[-1] ** -0.5, kernel=kernel)


def _block_mask(lengths: Tensor, device: str) -> Any:
    """FlexAttention's mask of a packed row: causal within a group, and no response sees another."""
    group, response = [], []
    for number, (_, prompt, responses) in enumerate(groups_of(lengths)):
        for place, length in enumerate((prompt, *responses)):
            group += [number] * length
            response += [place] * length
    groups, parts = torch.tensor(group, device=device), torch.tensor(response, device=device)

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = (parts[key] == 0) | (parts[key] == parts[query])
        return (groups[query] == groups[key]) & (key <= query) & same

    return create_block_mask(allowed, None, None, len(group), len(group), device=device)


def head(stage: Stage) -> None:
    """Forward and backward of the head over the response tokens of a batch, with full logits as a baseline."""
    if stage.device == "cpu":
        stage.left_out["liger"] = "Triton needs a GPU"
    elif find_spec("liger_kernel") is None:
        stage.left_out["liger"] = "liger-kernel is not installed"
    hidden, vocab_size = (64, 512) if stage.toy else (4096, 128_256)
    for shape, batches in stage.each_shape(1, vocab_size):
        for frozen in (False, True):
            targets = [token for row in batches[0] for side in ("chosen_ids", "rejected_ids") for token in row[side]]
            stage.measure(shape, partial(_head, stage, shape, targets, hidden, vocab_size, frozen))


def _head(stage: Stage, shape: str, targets: list[int], hidden: int, vocab_size: int, frozen: bool) -> dict[str, Any]:
    made = partial(torch.randn, device=stage.device, dtype=stage.dtype)
    states = made(len(targets), hidden).requires_grad_()
    weight = (made(vocab_size, hidden) * hidden**-0.5).requires_grad_(not frozen)
    labels = torch.tensor(targets, device=stage.device)
    ways: dict[str, Run] = {
        "plain": lambda _: _log_softmax(states, weight, labels),
        "tether": lambda _: token_log_probs(states, labels, weight),
    }
    if "liger" not in stage.left_out:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(reduction="none")
        ways["liger"] = lambda _: -liger(weight, states, labels)
    expected = ways["plain"](0)
    return {
        "shape": shape,
        "head": "frozen" if frozen else "trains",
        "tokens": len(targets),
        **_timed(ways, 1, stage),
        "peak_bytes": {
            way: harness.device_peak_bytes(partial(_both, run, 0), stage.device) for way, run in ways.items()
        },
        "largest_difference": {way: float((run(0) - expected).detach().abs().max()) for way, run in ways.items()},
    }


def _log_softmax(states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return (states @ weight.T).float().log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def _timed(ways: dict[str, Run], count: int, stage: Stage) -> dict[str, Any]:
    """Seconds of forward and backward of each item, the first time and thereafter."""
    runs = {way: partial(_both, run) for way, run in ways.items()}
    rounds = [harness.in_turns(runs, count, stage.device) for _ in range(2 if stage.toy else 6)]
    again = {way: [seconds for each in rounds[1:] for seconds in each[way]] for way in ways}
    return {
        "first_median_seconds": {way: statistics.median(times) for way, times in rounds[0].items()},
        "median_seconds": {way: statistics.median(times) for way, times in again.items()},
    }


def _both(run: Run, item: int) -> None:
    output = run(item)
    output.backward(torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output).to(output.dtype))
