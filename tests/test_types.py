"""`PairBatch`, `ResponseLogProbs` and `PairScores`: what they hold, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tether.types import PairBatch, PairScores, PromptImages, Response, ResponseLogProbs, TokenStatistics, offsets_of

A, B, C = Response((1, 2), (3,)), Response((1, 2), (4,)), Response((1, 2), (5, 6))
OTHER = Response((7,), (3,)), Response((7,), (8, 9, 10))

ids = st.lists(st.integers(0, 3), min_size=1, max_size=3).map(tuple)
PICTURES = [PromptImages({"pixel_values": torch.zeros(1, 3)}, {}, name) for name in (b"first", b"second")]
whole_responses = st.builds(
    Response, ids, ids, st.just(b""), st.none() | st.floats(-9, 0), st.none() | st.sampled_from(PICTURES), st.none()
)


def masked(response: Response, marks: list[bool]) -> Response:
    scored = tuple(marks[: len(response.token_ids)])
    return response if all(scored) else response._replace(scored=scored)


responses = st.builds(masked, whole_responses, st.lists(st.booleans(), min_size=3, max_size=3))
pairs_of_responses = st.lists(st.tuples(responses, responses), min_size=1, max_size=6)


def response_of(batch: PairBatch, index: int) -> Response:
    """One response of a batch as it was given: its prompt with its images, its tokens, and its sum if it has one."""
    group = batch.response_group[index]
    prompt = batch.prompt_ids.split(list(batch.prompt_lengths))[group]
    tokens = batch.response_ids.split(list(batch.response_lengths))[index]
    known = batch.reference_sums[index] if batch.reference_sums else None
    images = batch.images[group] if batch.images else None
    response = Response(tuple(prompt.tolist()), tuple(tokens.tolist()), reference_sum=known, images=images)
    if batch.scored is None:
        return response
    marks = batch.scored.split(list(batch.response_lengths))[index].tolist()
    assert batch.counted_lengths()[index] == sum(marks)
    return masked(response, marks)


def log_probs_of(lengths: list[int], **options: object) -> ResponseLogProbs:
    values = torch.arange(1.0, sum(lengths) + 1)
    return ResponseLogProbs(values, offsets_of(lengths), **options)


# ------------------------------------------------------------------------------------------------ PairBatch


@given(pairs_of_responses)
def test_batch_gives_every_pair_back(pairs: list[tuple[Response, Response]]) -> None:
    batch = PairBatch.of_pairs(pairs)
    found = [(response_of(batch, c), response_of(batch, r)) for c, r in zip(batch.chosen, batch.rejected, strict=True)]
    assert found == pairs
    assert [batch.responses()[index] for index in batch.chosen] == [chosen for chosen, _ in pairs]


@given(pairs_of_responses)
def test_batch_holds_each_prompt_and_each_response_once_and_groups_in_order(
    pairs: list[tuple[Response, Response]],
) -> None:
    batch = PairBatch.of_pairs(pairs)
    distinct = {response for pair in pairs for response in pair}
    assert batch.num_groups == len({(response.prompt_ids, response.images) for response in distinct})
    assert batch.num_responses == len(distinct) <= 2 * batch.num_pairs
    assert list(batch.response_group) == sorted(batch.response_group)


def test_batch_keeps_responses_apart_that_are_alike_but_keyed_differently() -> None:
    cut, whole = Response((1,), (2,), b"k" * 16), Response((1,), (2,), b"l" * 16)
    batch = PairBatch.of_pairs([(cut, whole)])
    assert batch.keys == (b"k" * 16, b"l" * 16)


def test_batch_counts_the_tokens_of_both_sequences_of_each_pair() -> None:
    batch = PairBatch.of_pairs([(A, C), (B, C), OTHER])
    assert batch.num_sequence_tokens() == (3 + 4) + (3 + 4) + (2 + 4)


def test_batch_pairs_values_up() -> None:
    batch = PairBatch.of_pairs([(A, B), (A, C)])
    chosen, rejected = batch.of_responses(torch.tensor([10.0, 20.0, 30.0]))
    assert chosen.tolist() == [10.0, 10.0] and rejected.tolist() == [20.0, 30.0]


def test_batch_refuses_an_empty_prompt_or_response_by_the_number_of_its_pair() -> None:
    with pytest.raises(ValueError, match="Pair 1 of the batch has an empty prompt or response"):
        PairBatch.of_pairs([(A, B), (A, Response((1, 2), ()))])
    with pytest.raises(ValueError, match="Pair 0"):
        PairBatch.of_pairs([(Response((), (1,)), A)])


def test_batch_knows_which_prompts_begin_alike_for_long_enough() -> None:
    system = tuple(range(100, 120))
    prompts = [(1, 2), (*system, 5, 6), (1, 3), (*system, 4), (*system, 5, 7, 8)]
    batch = PairBatch.of_pairs([(Response(prompt, (8,)), Response(prompt, (9,))) for prompt in prompts])
    assert batch.prefixes == ((0, 0), (2, 0), (3, 0), (1, 20), (4, 21))
    assert batch.only([0, 4]).prefixes == ()


def test_batch_moves_whole_and_is_not_changed_by_it() -> None:
    batch = PairBatch.of_pairs([(A, B)])
    moved = batch.to("meta")
    assert moved.device.type == moved.prompt_ids.device.type == "meta"
    assert batch.device.type == "cpu" and moved.chosen == batch.chosen


# ----------------------------------------------------------------------------------------- ResponseLogProbs


def test_offsets_start_at_zero_and_end_at_the_total() -> None:
    assert offsets_of([2, 1, 3]).tolist() == [0, 2, 3, 6]
    assert offsets_of([]).tolist() == [0]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_log_probs_sums_and_means_are_those_of_each_response(lengths: list[int]) -> None:
    log_probs = log_probs_of(lengths)
    parts = log_probs.split()
    assert [len(part) for part in parts] == lengths == log_probs.lengths().tolist()
    assert log_probs.num_responses == len(lengths)
    assert torch.equal(log_probs.sums(), torch.stack([part.sum() for part in parts]))
    torch.testing.assert_close(log_probs.means(), torch.stack([part.mean() for part in parts]))


def test_log_probs_sums_carry_the_gradient_to_every_token() -> None:
    values = torch.zeros(3, requires_grad=True)
    (ResponseLogProbs(values, offsets_of([1, 2])).sums() * torch.tensor([2.0, 5.0])).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [2.0, 5.0, 5.0]


def test_log_probs_detach_keeps_values_and_statistics_without_gradient() -> None:
    statistics = TokenStatistics(torch.zeros(3), torch.zeros(3), torch.zeros(3, dtype=torch.bool), torch.zeros(3))
    values = torch.zeros(3, requires_grad=True)
    detached = ResponseLogProbs(values, offsets_of([1, 2]), statistics, values.sum()).detach()
    assert not detached.values.requires_grad and detached.auxiliary_loss is None
    assert detached.statistics is statistics


# ----------------------------------------------------------------------------------------------- PairScores


def test_scores_sum_pair_up_and_subtract() -> None:
    batch = PairBatch.of_pairs([(A, C), (B, C)])  # responses: A (1 token), C (2 tokens), B (1 token)
    policy = ResponseLogProbs(torch.tensor([-1.0, -2.0, -3.0, -4.0]), offsets_of([1, 2, 1]))
    reference = ResponseLogProbs(torch.tensor([-1.5, -1.0, -1.0, -5.0]), offsets_of([1, 2, 1]))
    scores = PairScores.of(batch, policy, reference)
    assert scores.policy_chosen.tolist() == [-1.0, -4.0] and scores.policy_rejected.tolist() == [-5.0, -5.0]
    assert scores.reference_chosen.tolist() == [-1.5, -5.0] and scores.reference_rejected.tolist() == [-2.0, -2.0]
    assert scores.chosen_lengths.tolist() == [1, 1] and scores.rejected_lengths.tolist() == [2, 2]
    assert scores.chosen_logratios.tolist() == [0.5, 1.0] and scores.rejected_logratios.tolist() == [-3.0, -3.0]
    assert scores.delta.tolist() == [3.5, 4.0]
