"""What a loss of your own can read: single tokens, columns of the rows, a beta for each pair. Oracles are by hand."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from support.loss_equations import log_sigma
from support.observe import bits, same_bits
from support.runs import as_dataset, curve, make_trainer, stream, trained
from support.tiny import naive_log_probs, tiny_model, tiny_pairs
from tether import DataCollatorForPreference, LossOptions, PairScores
from tether.errors import ConfigurationError, DataError, NotHereError, NotInBatchError
from tether.reference import ExplicitReference, Traits, WrappingReference

pytestmark = pytest.mark.numerics

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
BETA = 0.3
CONFIDENCES = [0.25, 2.0, 0.5, 1.0, 0.0, 3.0]
Tokens = list[tuple[float, float]]  # the log-probs of each token of a response, under policy and reference


@pytest.fixture(scope="module")
def examples() -> ModuleType:
    """`examples/own_losses.py`."""
    spec = importlib.util.spec_from_file_location("own_losses", EXAMPLES / "own_losses.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        spec.loader.exec_module(module)
    return module


def rows() -> list[dict[str, Any]]:
    """Six pairs; two share a prompt and a response, and each has its numbers."""
    pairs = tiny_pairs(6)
    pairs[3] |= {"prompt": pairs[0]["prompt"], "chosen": pairs[0]["chosen"]}
    return [row | {"confidence": value, "beta": 0.1 + value} for row, value in zip(pairs, CONFIDENCES, strict=True)]


def by_hand(
    equation: Callable[[Tokens, Tokens, dict[str, Any]], float], trainer: Any, policy: Any, other: Any
) -> float:
    """The mean of an equation over the pairs, from one plain forward for each response under each model."""
    values = []
    with torch.no_grad():
        for tokens, row in zip(trainer.eval_dataset, rows(), strict=True):
            sides: list[Tokens] = []
            for side in ("chosen_ids", "rejected_ids"):
                both = (naive_log_probs(m.eval(), tokens["prompt_ids"], tokens[side]).tolist() for m in (policy, other))
                sides.append(list(zip(*both, strict=True)))
            values.append(equation(*sides, row))
    return sum(values) / len(values)


def ratio(response: Tokens) -> float:
    return sum(p - r for p, r in response)


EQUATIONS: dict[str, Callable[[Tokens, Tokens, dict[str, Any]], float]] = {
    "token_weighted": lambda w, lo, row: (
        -log_sigma(
            BETA * (sum((1 - math.exp(r)) * (p - r) for p, r in w) - sum((1 - math.exp(r)) * (p - r) for p, r in lo))
        )
    ),
    "confidence_weighted": lambda w, lo, row: row["confidence"] * -log_sigma(BETA * (ratio(w) - ratio(lo))),
    "with_kl_term": lambda w, lo, row: (
        -log_sigma(BETA * (ratio(w) - ratio(lo))) + 0.1 * sum(math.exp(r - p) - 1 - (r - p) for p, r in w) / len(w)
    ),
}


@pytest.mark.parametrize("name", EQUATIONS)
def test_a_loss_of_the_examples_is_its_equation(name: str, examples: ModuleType, tmp_path: Path) -> None:
    policy, other = tiny_model(), tiny_model(seed=3)
    columns = ["confidence"] if name == "confidence_weighted" else None
    trainer = make_trainer(
        tmp_path,
        policy,
        ref_model=other,
        loss=getattr(examples, name),
        loss_columns=columns,
        beta=BETA,
        eval_dataset=as_dataset(rows()),
        rows=rows(),
        per_device_eval_batch_size=4,
    )
    expected = by_hand(EQUATIONS[name], trainer, policy, other)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


# ---- tokens ----------------------------------------------------------------------------------------------------------


def summed(scores: PairScores, options: LossOptions) -> Tensor:
    assert scores.tokens is not None
    chosen, rejected = scores.tokens
    delta = chosen.sums(chosen.logratios) - rejected.sums(rejected.logratios)
    pieces = torch.stack([piece.sum() for piece in chosen.split(chosen.policy)])
    torch.testing.assert_close(pieces, scores.policy_chosen)
    assert [len(ids) for ids in rejected.split(rejected.ids)] == scores.rejected_lengths.tolist()
    return -torch.nn.functional.logsigmoid(options.beta * delta)


summed.needs_tokens = True  # type: ignore[attr-defined]


@pytest.mark.parametrize("options", [{}, {"precompute_ref_log_probs": True}, {"max_tokens_per_micro_batch": 300}])
def test_tokens_add_up_to_the_sums_and_train(options: dict[str, Any], tmp_path: Path) -> None:
    """So the same run as `sigmoid`, up to rounding."""
    own = trained(tmp_path / "own", rows=rows(), loss=summed, max_steps=4, **options)
    named = trained(tmp_path / "named", rows=rows(), max_steps=4, **options)
    assert curve(own) == pytest.approx(curve(named), rel=1e-4)


def test_tokens_are_refused_where_the_reference_knows_sums(tmp_path: Path) -> None:
    given = [row | {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for row in rows()]
    with pytest.raises(ConfigurationError, match="it weighs single tokens, and the columns are sums") as caught:
        make_trainer(tmp_path, rows=given, loss=summed)
    assert "`loss=...` with rows that bring" in str(caught.value)

    class OfSums(WrappingReference[Any]):
        traits = Traits(knows_tokens=False)

    for options in ({"loss": summed}, {"ld_alpha": 0.5}):
        with pytest.raises(ConfigurationError, match="the sum of each response only"):
            make_trainer(tmp_path, reference=lambda policy: OfSums(ExplicitReference.of_policy(policy)), **options)


# ---- columns ---------------------------------------------------------------------------------------------------------


def weighted(scores: PairScores, options: LossOptions) -> Tensor:
    return scores.columns["confidence"] + 0 * scores.delta


@pytest.mark.parametrize("shape", ["rows", "tokenized", "stream", "grouped by length", "padded", "precomputed"])
def test_a_column_reaches_the_loss(shape: str, tmp_path: Path) -> None:
    given: Any = [row | {"confidence": 0.75} for row in rows()]
    options: dict[str, Any] = {}
    if shape == "tokenized":
        tokenized = make_trainer(tmp_path, rows=given).train_dataset
        given = tokenized.select_columns(["prompt_ids", "chosen_ids", "rejected_ids", "confidence"])
    elif shape == "stream":
        given = stream(given)
    elif shape == "grouped by length":
        options = {"max_tokens_per_micro_batch": 200}
    elif shape == "padded":
        collator = DataCollatorForPreference(pad_token_id=0)
        options = {"data_collator": lambda rows: collator(rows)}
    elif shape == "precomputed":
        options = {"precompute_ref_log_probs": True}
    trainer = trained(tmp_path, rows=given, loss=weighted, loss_columns=["confidence"], max_steps=1, **options)
    assert curve(trainer)[0] == pytest.approx(0.75)


BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no such column": ({"loss_columns": ["trust"]}, {}, "the train set: it has no column `trust`"),
    "not a number": ({"loss_columns": ["confidence"]}, {"confidence": "much"}, "Row 2 of the train set has"),
    "not finite": ({"loss_columns": ["confidence"]}, {"confidence": math.inf}, "it must be a finite number"),
    "no number": ({"loss_columns": ["confidence"]}, {"confidence": None}, "Row 2 of the train set has"),
    "a beta of 0": ({"beta_column": "beta"}, {"beta": 0.0}, "it must be a positive number"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("streams", [False, True])
def test_a_column_that_is_no_number_is_refused_by_its_row(name: str, streams: bool, tmp_path: Path) -> None:
    options, change, message = BAD[name]
    given: Any = rows()
    given[2] |= change
    if name == "not a number":  # a column has one type
        given = [row | change for row in given]
        message = message.replace("Row 2", "Row 0")
    if streams:
        given, message = stream(given), re.sub("Row . of the train set", "A row of a batch", message)
    loss = {"loss": weighted} if "loss_columns" in options else {}
    with pytest.raises(DataError, match=message):
        trained(tmp_path, rows=given, max_steps=2, **loss, **options)


def test_a_loss_that_reads_what_it_did_not_ask_for_is_told_how_to_ask(tmp_path: Path) -> None:
    def forgets(scores: PairScores, options: LossOptions) -> Tensor:
        assert scores.tokens is not None or options.beta == BETA
        return scores.delta * scores.tokens.chosen.policy.sum()  # type: ignore[union-attr]

    def misnames(scores: PairScores, options: LossOptions) -> Tensor:
        return scores.delta * scores.columns["trust"]

    with pytest.raises(NotHereError, match=r"Cannot read `scores\.tokens\.chosen` in the loss 'forgets': ") as caught:
        trained(tmp_path, rows=rows(), loss=forgets, beta=BETA, max_steps=1)
    assert "forgets.needs_tokens = True" in caught.value.instead
    with pytest.raises(NotInBatchError, match=r"Cannot read `scores\.columns\['trust'\]`: ") as missing:
        trained(tmp_path, rows=rows(), loss=misnames, loss_columns=["confidence"], max_steps=1)
    assert "loss_columns=['confidence', 'trust']" in missing.value.instead


def test_the_columns_of_a_set_are_told_as_the_user_has_them(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        make_trainer(tmp_path, rows=rows(), loss=weighted, loss_columns=["trust"])
    assert caught.value.details == "It has prompt, chosen, rejected, confidence, beta."


def test_a_loss_beside_named_ones_blames_what_was_set(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"Cannot use `loss=...` with `loss_type=\['ipo'\]`: your own"):
        make_trainer(tmp_path, rows=rows(), loss=weighted, loss_type="ipo")


def test_columns_without_a_reader_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="the named losses read no further columns"):
        make_trainer(tmp_path, rows=rows(), loss_columns=["confidence"])


# ---- a beta for each pair --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "sppo_hard"])
def test_a_beta_for_each_pair_is_that_of_a_run_on_the_pair_alone(name: str, tmp_path: Path) -> None:
    def evaluated(given: list[dict[str, Any]], **options: Any) -> tuple[float, float]:
        trainer = make_trainer(tmp_path, ref_model=tiny_model(seed=3), rows=given, loss_type=name, **options)
        found = trainer.evaluate(as_dataset(given))
        return found["eval_loss"], found["eval_rewards/margins"]

    given = rows()[:3]
    alone = [evaluated([row], beta=row["beta"]) for row in given]
    expected = [sum(values) / 3 for values in zip(*alone, strict=True)]
    assert evaluated(given, beta_column="beta") == pytest.approx(expected, rel=1e-5)


def test_a_beta_for_each_pair_trains_as_one_for_all_where_they_are_equal(tmp_path: Path) -> None:
    given = [row | {"beta": 0.25} for row in rows()]
    columns = trained(tmp_path / "columns", rows=given, loss_type=["bco_pair"], beta_column="beta")
    options = trained(tmp_path / "options", rows=given, loss_type=["bco_pair"], beta=0.25)
    assert same_bits(bits(columns.model), bits(options.model))


def test_a_beta_beside_the_column_or_in_a_loss_that_sorts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"`beta=0\.2` with `beta_column='beta'`"):
        make_trainer(tmp_path, rows=rows(), beta=0.2, beta_column="beta")
    with pytest.raises(ConfigurationError, match="`aot` sorts the pairs"):
        make_trainer(tmp_path, rows=rows(), loss_type="aot", beta_column="beta")
