"""The noise of rounding: what is measured, and what it explains of a difference."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from support.kinds import BATCH
from support.rounding import RoundsByBatch
from support.runs import as_dataset, steps, trained
from support.tiny import tiny_model, tiny_pairs
from tether.reference import ExplicitReference
from tether.reference.base import Traits
from tether.reference.noise import ALIKE, Gap, Noise, measured, unreduced
from tether.reference.watch import ReferenceWatch
from tether.types import PairBatch, Response, ResponseLogProbs, offsets_of

# Log-probs of an answer by yes or no: the word is open, the two tokens that end the turn are sure.
ANSWER = torch.tensor([0.3, 0.99, 0.999]).log()


def log_probs(values: Tensor, length: int = 3) -> ResponseLogProbs:
    return ResponseLogProbs(values, offsets_of([length] * (len(values) // length), values.device))


def answers(num: int) -> ResponseLogProbs:
    return log_probs(ANSWER.repeat(num))


def rounded(exact: ResponseLogProbs, spread: float, seed: int) -> ResponseLogProbs:
    """The same with errors of as many standard deviations as real ones have, and with tails."""
    draw = torch.distributions.StudentT(torch.tensor(5.0))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        errors = draw.sample(exact.values.shape) / draw.stddev
    return replace(exact, values=exact.values + spread * (1 - exact.values.exp()) * errors)


def allowed(noise: Noise, one: ResponseLogProbs, other: ResponseLogProbs) -> bool:
    gap = Gap.between(one, other, unreduced)
    return gap.within(noise.allowed(gap, "bfloat16"))


# ------------------------------------------------------------------------------------------- what is measured


def test_errors_of_logits_move_a_log_prob_by_its_scale_or_up_to_a_square_root_of_two_more() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(200, 50, generator=generator, dtype=torch.float64)
    errors = 1e-3 * torch.randn(4000, 200, 50, generator=generator, dtype=torch.float64)
    tokens = torch.randint(50, (200, 1), generator=generator)
    plain = logits.log_softmax(-1).gather(-1, tokens)[:, 0]
    found = ((logits + errors).log_softmax(-1).gather(-1, tokens.expand(4000, -1, -1))[..., 0] - plain).std(0)
    share = found / (1e-3 * -torch.expm1(plain))
    assert share.min() > 0.95 and share.max() < 1.05 * 2**0.5
    scales = ResponseLogProbs(plain.float(), torch.tensor([0, 200])).rounding_scales()
    torch.testing.assert_close(scales, (-torch.expm1(plain)).float().square().add(0.03**2).sqrt())


def test_noise_is_the_difference_of_two_scorings_in_units_of_each_token_s_scale() -> None:
    one = log_probs(torch.tensor([0.5, 0.5, 0.5, 0.5]).log(), length=2)
    off = torch.tensor([0.1, 0.1, -0.3, 0.1])
    noise = Noise.between(one, replace(one, values=one.values - off), unreduced)
    scale = (0.5**2 + 0.03**2) ** 0.5
    assert noise.mean == pytest.approx(0.6 / 4, rel=1e-5)
    assert noise.shift == pytest.approx(0.0, abs=1e-7)
    assert noise.spread == pytest.approx((0.12 / 4) ** 0.5 / scale, rel=1e-5)
    assert noise.spread_of_responses == pytest.approx(((0.2**2 + 0.2**2) / 2 / 2) ** 0.5 / scale, rel=1e-5)
    assert noise.num_tokens == 4


@pytest.mark.parametrize("num_pairs", [1, 2, 5])
def test_measuring_takes_two_passes_in_other_company(num_pairs: int) -> None:
    """Processes that have other numbers of pairs make as many passes, or sharded ones would wait forever."""
    rows = [(Response((1,), (2, pair)), Response((1, pair), (3,))) for pair in range(num_pairs)]
    batch, sizes = PairBatch.of_pairs(rows), []

    def score(part: PairBatch) -> ResponseLogProbs:
        sizes.append(part.num_responses)
        values = torch.full((len(part.response_ids),), -1.0 - part.num_responses)
        return ResponseLogProbs(values, offsets_of(part.response_lengths, part.device))

    noise = measured(score, batch, score(batch), unreduced)
    whole, first, second = sizes
    assert (whole, first + second) == (2 * num_pairs, 2 * num_pairs) and first < whole
    tokens = [3 * (first // 2), 3 * (second // 2)] if num_pairs > 1 else [2, 1]
    off = [whole - first, whole - second]
    assert noise.mean == pytest.approx(sum(n * d for n, d in zip(tokens, off, strict=True)) / sum(tokens))


def test_noise_can_be_kept_as_json() -> None:
    noise = Noise.between(answers(4), rounded(answers(4), 0.1, 0), unreduced)
    assert Noise(**json.loads(json.dumps(asdict(noise)))) == noise


def test_noises_of_two_machines_add_as_their_scorings_do() -> None:
    """A difference between them has one error of each; each noise is a difference with two of one machine."""
    quiet, loud = (Noise.between(answers(20_000), rounded(answers(20_000), s, 1), unreduced) for s in (0.02, 0.1))
    both = quiet + loud
    here, there = rounded(answers(20_000), 0.02 / 2**0.5, 2), rounded(answers(20_000), 0.1 / 2**0.5, 3)
    assert both.spread == pytest.approx(Noise.between(here, there, unreduced).spread, rel=0.05)
    assert (quiet + quiet).spread == pytest.approx(quiet.spread)


# ------------------------------------------------------------------------------------------- what it explains


def test_a_shift_of_all_tokens_is_found_as_large_as_it_is() -> None:
    one = rounded(answers(5), 0.1, 0)
    gap = Gap.between(one, replace(one, values=one.values + 0.02), unreduced)
    assert gap.shift == pytest.approx(-0.02, rel=1e-4) and gap.mean == pytest.approx(0.02, rel=1e-4)


@pytest.mark.parametrize("spread", [0.05, 0.15])
def test_rounding_is_no_gap_and_a_shift_of_a_fiftieth_is_one_under_scatter_as_large(spread: float) -> None:
    """Sixteen short answers, 300 times; the mean difference is that of SmolLM2 in bfloat16, or as much again."""
    exact = answers(16)
    for seed in range(300):
        policy, again, stored = (rounded(exact, spread / 2**0.5, 3 * seed + number) for number in range(3))
        noise = Noise.between(policy, again, unreduced)
        assert allowed(noise, policy, stored), seed
        for shift in (-0.02, 0.02):
            assert not allowed(noise, policy, replace(stored, values=stored.values + shift)), seed


def test_a_larger_noise_than_was_measured_is_a_gap() -> None:
    exact = answers(16)
    noise = Noise.between(exact, rounded(exact, 0.05, 0), unreduced)
    assert not allowed(noise, exact, rounded(exact, 0.3, 1))


def test_a_smaller_shift_is_seen_on_more_tokens() -> None:
    few, many = (Gap.between(answers(num), answers(num), unreduced) for num in (16, 1600))
    noise = Noise(mean=0.04, shift=0.0, shift_error=0.0, spread=0.1, spread_of_responses=0.1, num_tokens=10**8)
    seen = [noise.allowed(gap, "float32").shift - ALIKE["float32"].mean for gap in (few, many)]
    assert seen[1] == pytest.approx(seen[0] / 10)


def test_as_many_open_tokens_as_a_shift_needs_show_it_each_time() -> None:
    """Sixteen answers of two such tokens show no shift of 0.02 under a spread of 0.1; the share that is named does."""

    def words(num: int) -> ResponseLogProbs:
        return log_probs(torch.tensor([0.1, 0.02]).log().repeat(num), length=2)

    sample = words(16)
    for seed in range(100):
        noise = Noise.between(sample, rounded(sample, 0.1, 3 * seed), unreduced)
        share = noise.share_needed(Gap.between(sample, sample, unreduced), 0.02)
        many = words(int(share * 16) + 1)
        policy, stored = (rounded(many, 0.1 / 2**0.5, 3 * seed + number) for number in (1, 2))
        assert allowed(noise, policy, stored), seed
        for shift in (-0.02, 0.02):
            assert not allowed(noise, policy, replace(stored, values=stored.values + shift)), seed
    assert 20 < share < 200


def test_sums_are_compared_by_response() -> None:
    """The errors of a sum are those of its tokens, added up as independent ones."""
    one, off = answers(4), torch.tensor([0.3, 0.0, 0.0, 0.0])
    sums = ResponseLogProbs(torch.zeros(12), one.offsets)
    sums.values[one.offsets[:-1]] = one.sums() - off
    gap = Gap.between(one, sums, unreduced, knows_tokens=False)
    assert (gap.mean, gap.largest, gap.num) == (pytest.approx(0.3 / 3 / 4, rel=1e-5), pytest.approx(0.1, rel=1e-5), 4)
    scale = sum((1 - p) ** 2 + 0.03**2 for p in (0.3, 0.99, 0.999)) ** 0.5 / 3
    assert gap.largest_scale == pytest.approx(scale, rel=1e-4)


# ------------------------------------------------------------------------------------------- in a run


def test_stored_answers_are_judged_by_the_noise_of_the_policy_in_other_batches() -> None:
    policy = tiny_model(dtype=torch.bfloat16)
    watch, reference = watch_of(policy), ExplicitReference(policy)
    apart = [reference.log_probs(BATCH.only([index])).values for index in range(BATCH.num_responses)]
    with RoundsByBatch():
        watch.measure_noise(policy, BATCH, 0.02)
    assert watch.noise is not None and watch.noise.spread > 0
    watch.check_rows(policy, [(BATCH, log_probs_of(BATCH, torch.cat(apart)))], "these rows")


class OnDisk(ExplicitReference):
    """The policy's own answers, as if they came from a store."""

    @property
    def traits(self) -> Traits:
        return replace(super().traits, answers_are_stored=True, means_policy=True)


def watch_of(policy: Any) -> ReferenceWatch:
    return ReferenceWatch(OnDisk(policy), None, unreduced)


def log_probs_of(batch: PairBatch, values: Tensor) -> ResponseLogProbs:
    return ResponseLogProbs(values, offsets_of(batch.response_lengths, batch.device))


@pytest.mark.parametrize("stored", [True, False])
def test_the_noise_is_logged_once_where_answers_are_stored(stored: bool, tmp_path: Path) -> None:
    trainer = trained(tmp_path, precompute_ref_log_probs=stored, eval_dataset=as_dataset(tiny_pairs(4)))
    logged = [entry["reference/noise"] for entry in steps(trainer) if "reference/noise" in entry]
    assert len(logged) == stored
    assert all(0 <= noise < 1e-5 for noise in logged)


def test_a_large_noise_is_said_in_one_line_with_the_remedy(caplog: pytest.LogCaptureFixture) -> None:
    policy = tiny_model(dtype=torch.bfloat16, layers=8)
    with caplog.at_level(logging.WARNING, "tether.reference.watch"), RoundsByBatch():
        watch_of(policy).measure_noise(policy, BATCH, 0.02)
    (line,) = caplog.messages
    assert "\n" not in line and "nats per token" in line
    assert "`ref_dtype='float32'`" in line and "`precompute_ref_log_probs=False`" in line


def test_more_rows_are_looked_at_where_a_few_cannot_show_a_small_shift(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    check = ReferenceWatch.check_rows

    def count(self: Any, policy: Any, parts: Any, where: str) -> None:
        parts = list(parts)
        seen.append(sum(batch.num_pairs for batch, _ in parts))
        check(self, policy, parts, where)

    monkeypatch.setattr(ReferenceWatch, "check_rows", count)
    rows = [{"prompt": f"{row} ", "chosen": "a", "rejected": "b"} for row in range(40)]
    options: dict[str, Any] = {"precompute_ref_log_probs": True, "max_steps": 1, "per_device_train_batch_size": 2}
    with RoundsByBatch():
        trained(tmp_path / "rough", tiny_model(dtype=torch.bfloat16), rows, **options)
    few, many = seen
    assert few == 8 < many <= 40
    seen.clear()
    trained(tmp_path / "exact", tiny_model(), rows, **options)
    assert len(seen) == 1  # float32: a shift of 0.02 is seen at once
