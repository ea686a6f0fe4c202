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
from tether.scoring.chains import Link, PackedRow
from tether.scoring.head import token_log_probs

Run = Callable[[int], Tensor]  # the output for an item, of which there are inputs


def attention(stage: Stage) -> None:
    """Forward and backward of one layer's attention by shape: each row for the first time, then again."""
    if stage.device == "cpu":
        stage.left_out["varlen, flex"] = "they need CUDA"
    for shape, batches in stage.each_shape(3 if stage.toy else 6, vocab_size=100):
        stage.measure(shape, partial(_attention, stage, shape, batches))


def _attention(stage: Stage, shape: str, batches: list[Rows]) -> dict[str, Any]:
    heads, size = (4, 16) if stage.toy else (32, 128)
    packed_rows = [_packed_row(rows, stage.device) for rows in batches]
    made = partial(torch.randn, device=stage.device, dtype=stage.dtype, requires_grad=True)
    inputs = [
        [made(1, count, harness.num_tokens(rows), size) for count in (heads, heads // 4, heads // 4)]
        for rows in batches
    ]

    def packed(kernel: Any, item: int) -> Tensor:
        return packed_attention(*inputs[item], packed_rows[item], scale=size**-0.5, kernel=kernel)

    ways: dict[str, Run] = {"pairwise": partial(packed, "pairwise")}
    if stage.device == "cuda":
        masks = [_block_mask(rows, "cuda") for rows in batches]
        flex = torch.compile(flex_attention, dynamic=True)  # or it is compiled for each length, and soon no more
        ways["varlen"] = partial(packed, "varlen")
        ways["flex"] = lambda item: flex(*inputs[item], block_mask=masks[item], enable_gqa=True).transpose(1, 2)
    last = len(batches) - 1  # tried first, and not timed
    differences = _differences(stage, shape, ways, inputs, last)
    rounds = _rounds(stage, {way: ways[way] for way in differences}, inputs[:last])
    return {
        "shape": shape,
        "row": [leaves[0].shape[2] for leaves in inputs[:last]],
        "first_median_seconds": _medians(rounds[:1]),
        "median_seconds": _medians(rounds[1:]),
        "largest_difference": differences,
    }


def _lengths(row: dict[str, Any]) -> tuple[int, int, int]:
    return len(row["prompt_ids"]), len(row["chosen_ids"]), len(row["rejected_ids"])


def _packed_row(rows: Rows, device: str) -> PackedRow:
    links: list[Link] = []
    for prompt, chosen, rejected in map(_lengths, rows):
        links += [Link(0, 0, prompt + chosen), Link(len(links), prompt, rejected)]
    return PackedRow(links, device)


def _block_mask(rows: Rows, device: str) -> Any:
    """FlexAttention's mask of a packed row: causal within a group, and no response sees another."""
    group, response = [], []
    for number, lengths in enumerate(map(_lengths, rows)):
        for place, length in enumerate(lengths):
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
    vocab_size = 512 if stage.toy else 128_256
    for shape, batches in stage.each_shape(1, vocab_size):
        targets = [token for row in batches[0] for side in ("chosen_ids", "rejected_ids") for token in row[side]]
        for frozen in (False, True):
            what = f"{shape}, {'frozen' if frozen else 'trains'}"
            stage.measure(what, partial(_head, stage, shape, targets, vocab_size, frozen))


def _head(stage: Stage, shape: str, targets: list[int], vocab_size: int, frozen: bool) -> dict[str, Any]:
    hidden = 64 if stage.toy else 4096
    made = partial(torch.randn, device=stage.device, dtype=stage.dtype)
    states = made(len(targets), hidden, requires_grad=True)
    weight = (made(vocab_size, hidden) * hidden**-0.5).requires_grad_(not frozen)
    labels = torch.tensor(targets, device=stage.device)
    inputs = [[states] if frozen else [states, weight]]
    ways: dict[str, Run] = {
        "plain": lambda _: (states @ weight.T).float().log_softmax(-1).gather(-1, labels[:, None])[:, 0],
        "tether": lambda _: token_log_probs(states, labels, weight),
    }
    if "liger" not in stage.left_out:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(reduction="none")
        ways["liger"] = lambda _: -liger(weight, states, labels)
    differences = _differences(stage, shape, ways, inputs, 0)
    runs = {way: partial(_forward_and_backward, ways[way], inputs) for way in differences}
    return {
        "shape": shape,
        "head": "frozen" if frozen else "trains",
        "tokens": len(targets),
        "median_seconds": _medians(_rounds(stage, {way: ways[way] for way in differences}, inputs)[1:]),
        "peak_bytes": {way: harness.device_peak_bytes(partial(run, 0), stage.device) for way, run in runs.items()},
        "largest_difference": differences,
    }


def _differences(
    stage: Stage, shape: str, ways: dict[str, Run], inputs: list[list[Tensor]], item: int
) -> dict[str, float]:
    """Of every way that works, to the first one."""
    outputs = {
        way: stage.attempt(f"{way}, {shape}", partial(_forward_and_backward, run, inputs, item))
        for way, run in ways.items()
    }
    done = {way: output for way, output in outputs.items() if output is not None}
    expected = next(iter(done.values()))
    return {way: float((output - expected).abs().max()) for way, output in done.items()}


def _rounds(stage: Stage, ways: dict[str, Run], inputs: list[list[Tensor]]) -> list[dict[str, list[float]]]:
    """Seconds of forward and backward of every item, once in each round."""
    runs = {way: partial(_forward_and_backward, run, inputs) for way, run in ways.items()}
    return [harness.in_turns(runs, len(inputs), stage.device) for _ in range(2 if stage.toy else 6)]


def _forward_and_backward(run: Run, inputs: list[list[Tensor]], item: int) -> Tensor:
    output = run(item)
    upstream = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output).to(output.dtype)
    torch.autograd.grad(output, inputs[item], upstream)
    return output.detach()


def _medians(rounds: list[dict[str, list[float]]]) -> dict[str, float]:
    return {way: statistics.median(seconds for each in rounds for seconds in each[way]) for way in rounds[0]}
