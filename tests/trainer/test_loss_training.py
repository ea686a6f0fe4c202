"""Every loss in a whole run: TRL's curves, and what a run says of margins, weights, routers and no reference."""

from __future__ import annotations

import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from support.observe import bits, same_bits
from support.runs import as_dataset, curve, differences, make_trainer, shared_names, steps, stream, trained
from support.tiny import naive_log_probs, tiny_model, tiny_pairs, tiny_tokenizer
from support.trl_oracle import trl_curve
from tether import DataCollatorForPreference, DPOConfig, LossOptions, PairScores
from tether.errors import ConfigurationError, DataError, ResumeError
from tether.losses import LOSSES
from tether.reference import ExplicitReference, FreeReference, ImplicitReference, PrecomputedReference, Reference

pytestmark = pytest.mark.numerics


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tiny models with their tokenizer on disk, by family."""
    found = {}
    for family in ("llama", "mixtral", "hunyuan_v1_moe"):
        folder = tmp_path_factory.mktemp(family)
        tiny_model(family).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        found[family] = str(folder)
    return found


SMOOTHING = {"exo_pair": 1e-3, "robust": 0.1, "aot": 0.1}
# TRL has no running mean in `bco_pair`, and its `sft` is the mean over the tokens of a batch: equal for one pair.
ONLY_OURS: dict[str, dict[str, Any]] = {"bco_pair": {"bco_reward_shift": False}}
BOTH: dict[str, dict[str, Any]] = {
    "sft": {"per_device_train_batch_size": 1},
    "sppo_hard": {"loss_weights": [1e-3]},  # squares of nats, hundreds of them: nothing in fp32 is within 1e-4 of that
    # Its blend turns within `tau / beta` nats, half a nat at the default beta. TRL then parts from itself, on weights
    # multiplied by 1 + 1e-7 epsilon, by 2e-4 of the gradient's norm within 30 steps; here by 3e-5.
    "discopop": {"beta": 0.02},
}

RUNS: dict[str, dict[str, Any]] = {
    name: {"loss_type": [name], "label_smoothing": SMOOTHING.get(name, 0.0)} | BOTH.get(name, {})
    for name in LOSSES
    if name != "hypo"  # TRL has none
} | {
    "MPO": {
        "loss_type": ["sigmoid", "bco_pair", "sft"],
        "loss_weights": [0.8, 0.2, 1.0],
        "per_device_train_batch_size": 1,
        "bco_reward_shift": False,
    },
    # Its exponential of a response's sum multiplies the rounding of that sum: TRL parts from itself as above by 1e-4
    # with sums of 280 nats, by 5e-5 with those of 60.
    "forward_kl": {"f_divergence_type": "forward_kl", "response_characters": 24},
    "js_divergence": {"f_divergence_type": "js_divergence", "loss_type": ["ipo"], "loss_weights": [0.1]},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
    "LD-DPO": {"ld_alpha": 0.3, "loss_type": ["sigmoid_norm"]},
    "WPO": {"use_weighting": True, "loss_weights": [2000.0]},  # the weights of a model that knows nothing are tiny
    "discopop_tau": {"loss_type": ["discopop"], "discopop_tau": 0.5},
    "router": {"family": "mixtral"},
    # At 1e-3 a token meets two experts so nearly tied that a rounding chooses, in TRL against itself too.
    "router, coefficient": {
        "family": "mixtral", "router_aux_loss_coef": 0.5, "loss_type": ["hinge"], "learning_rate": 3e-4
    },
    "router without a loss of its own": {
        "family": "hunyuan_v1_moe", "router_aux_loss_coef": 0.5, "learning_rate": 3e-4
    },
}  # fmt: skip
REFERENCES: dict[str, tuple[type[Reference], dict[str, Any]]] = {
    "explicit": (ExplicitReference, {}),
    "implicit": (
        ImplicitReference,
        {"peft_config": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])},
    ),
    "precomputed": (PrecomputedReference, {"precompute_ref_log_probs": True}),
}
# Where something is subtle, TRL's run is compared by default; for the plain functions above, with the slow tests.
QUICK = ("bco_pair", "aot", "sft", "discopop", "MPO", "forward_kl", "LD-DPO", "WPO", "router, coefficient",
         "router without a loss of its own")  # fmt: skip
# fp32 cannot tell sums of hundreds of nats, and norms of their gradients, apart to 1e-4: to 1e-4 of their size.
LARGE = ("grad_norm", "logps/chosen", "logps/rejected")


def needs_router_logits(family: str) -> None:
    outputs = tiny_model(family)(input_ids=torch.tensor([[1, 2]]), output_router_logits=True, use_cache=False)
    if "router_logits" not in outputs:
        pytest.skip(f"this version of transformers returns no router logits for {family}")


def assert_equal_to_trl(name: str, reference: str, num_steps: int, folders: dict[str, str], tmp_path: Path) -> None:
    kind, more = REFERENCES[reference]
    if name == "router without a loss of its own":
        needs_router_logits(RUNS[name]["family"])
    options = {
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "max_steps": num_steps,
        "logging_steps": 1,
        "gradient_checkpointing": False,
    } | RUNS[name]
    options["learning_rate"] *= 10 if reference == "implicit" else 1  # its B starts at 0, and few weights train
    folder, rows = folders[options.pop("family", "llama")], shortened(options.pop("response_characters", None))
    ours_only = {key: options.pop(key) for key in ("bco_reward_shift",) if key in options} | ONLY_OURS.get(name, {})
    # Each gets its own `peft_config`: PEFT writes into the one that it is given.
    theirs = trl_curve(folder, rows, tiny_tokenizer(), tmp_path / "trl", **options | deepcopy(more))
    trainer = trained(tmp_path / "tether", folder, rows, **options | deepcopy(more) | ours_only)
    assert isinstance(trainer.reference, kind)
    assert_same_curves(steps(trainer), theirs)


def shortened(characters: int | None) -> list[dict[str, Any]]:
    rows = [row | {side: row[side][:characters] for side in ("chosen", "rejected")} for row in tiny_pairs(32)]
    return [row for row in rows if row["chosen"] != row["rejected"]]


def assert_same_curves(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> None:
    assert len(ours) == len(theirs) and shared_names(ours[1]) == theirs[1].keys()
    for metric, difference in differences(ours, theirs).items():
        size = max(abs(entry[metric]) for entry in theirs) if metric in LARGE else 1
        assert difference <= 1e-4 * max(1, size), metric
    moved = max(abs(entry["rewards/chosen"]) for entry in ours)
    assert moved > 5e-3 * (len(ours) / 5), "little was learnt: the curves say little"


@pytest.mark.parametrize("name", QUICK)
def test_curves_equal_those_of_trl(name: str, folders: dict[str, str], tmp_path: Path) -> None:
    assert_equal_to_trl(name, "explicit", 5, folders, tmp_path)


@pytest.mark.parametrize("name", ["ipo", "MPO", "WPO"])
def test_curves_of_an_adapter_equal_those_of_trl(name: str, folders: dict[str, str], tmp_path: Path) -> None:
    assert_equal_to_trl(name, "implicit", 5, folders, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("name", RUNS)
def test_30_steps_equal_those_of_trl(name: str, reference: str, folders: dict[str, str], tmp_path: Path) -> None:
    assert_equal_to_trl(name, reference, 30, folders, tmp_path)


# ---------------------------------------------------------------------------------------------------- the options


def test_weighting_and_statistics_do_not_change_what_is_logged_of_an_unweighted_run(tmp_path: Path) -> None:
    """WPO's weights are 1 for nobody here, so its loss differs; the rewards at the first step do not."""
    plain, weighted = (trained(tmp_path / str(use), max_steps=1, use_weighting=use) for use in (False, True))
    assert curve(weighted)[0] < curve(plain)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert curve(weighted, "entropy") == curve(plain, "entropy")


def test_router_loss_is_added_by_the_models_own_coefficient_and_can_be_switched_off(tmp_path: Path) -> None:
    def run(**options: Any) -> Any:
        return steps(trained(tmp_path, tiny_model("mixtral", router_aux_loss_coef=0.25), max_steps=1, **options))[0]

    own, off, other = run(), run(router_aux_loss_coef=0.0), run(router_aux_loss_coef=1.0)
    assert off["loss"] == pytest.approx(math.log(2), abs=1e-6) and "aux_loss" not in off
    assert own["aux_loss"] > 1.5  # two experts of four for each token: 2 where the load is even
    assert own["loss"] == pytest.approx(math.log(2) + 0.25 * own["aux_loss"], rel=1e-5)
    assert other["loss"] == pytest.approx(math.log(2) + own["aux_loss"], rel=1e-5)


@pytest.mark.parametrize(("family", "own"), [("glm4_moe", 0.0), ("hunyuan_v1_moe", 0.0), ("llama4_text", 0.001)])
def test_router_loss_is_made_where_the_model_defines_none(family: str, own: float, tmp_path: Path) -> None:
    needs_router_logits(family)

    def run(**options: Any) -> Any:
        return steps(trained(tmp_path, tiny_model(family), max_steps=1, **options))[0]

    by_default, asked = run(), run(router_aux_loss_coef=0.5)
    assert asked["aux_loss"] >= 1 and asked["loss"] == pytest.approx(math.log(2) + 0.5 * asked["aux_loss"], rel=1e-5)
    assert by_default["loss"] == pytest.approx(math.log(2) + own * asked["aux_loss"], rel=1e-5)
    assert ("aux_loss" in by_default) is (own > 0)


DENSE = {
    "another family": ("llama", {}),
    "a family with experts": ("granitemoehybrid", {"num_local_experts": 0, "num_experts_per_tok": 0}),
    "all layers dense": ("qwen2_moe", {"mlp_only_layers": [0, 1]}),
}


@pytest.mark.parametrize(("family", "config"), DENSE.values(), ids=DENSE)
def test_router_loss_of_a_model_without_a_router_is_refused(family: str, config: Any, tmp_path: Path) -> None:
    declared = getattr(tiny_model(family, **config), "_can_record_outputs", {})
    if family == "granitemoehybrid" and "router_logits" not in declared:
        pytest.skip("this version of transformers does not say which of its modules are routers")
    with pytest.raises(ConfigurationError, match=r"router_aux_loss_coef=0\.1.* no loss to weigh"):
        make_trainer(tmp_path, tiny_model(family, **config), router_aux_loss_coef=0.1)
    trainer = trained(tmp_path, tiny_model(family, **config), max_steps=1)
    assert curve(trainer) == pytest.approx([math.log(2)], abs=1e-6)
    assert not trainer.aux_loss_enabled and "aux_loss" not in steps(trainer)[0]


def test_router_loss_that_would_have_no_gradient_is_refused(tmp_path: Path) -> None:
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ConfigurationError, match="use_reentrant"):
        make_trainer(tmp_path, tiny_model("mixtral"), **reentrant)
    make_trainer(tmp_path, tiny_model("mixtral"), **reentrant, router_aux_loss_coef=0.0)
    make_trainer(tmp_path, tiny_model("mixtral"), **reentrant | {"gradient_checkpointing": False})


def test_router_loss_of_steps_after_the_last_log_is_in_the_last_entry(tmp_path: Path) -> None:
    """As in TRL, whose tests look for it there."""
    every_step = trained(tmp_path / "each", tiny_model("mixtral"))
    last = trained(tmp_path / "last", tiny_model("mixtral"), logging_steps=10).state.log_history[-1]
    assert last["aux_loss"] == pytest.approx(sum(curve(every_step, "aux_loss")) / 3, rel=1e-6)
    assert last["num_tokens"] == curve(every_step, "num_tokens")[-1]
    assert "train_loss" in last and "loss" not in last
    assert "aux_loss" not in every_step.state.log_history[-1]


# ------------------------------------------------------------------------------------------------- reference-free


def test_reference_free_rewards_are_the_policys_own_log_probs(tmp_path: Path) -> None:
    rows = tiny_pairs(4)
    trainer = make_trainer(tmp_path, rows=rows, reference_free=True, beta=0.3, max_steps=1, eval_dataset=rows)
    assert isinstance(trainer.reference, FreeReference) and trainer.ref_model is None
    assert trainer.reference.extra_bytes == trainer.reference.num_passes == 0
    found = trainer.evaluate()
    model = tiny_model()
    rewards: dict[str, list[float]] = {"chosen": [], "rejected": []}
    for row in trainer.eval_dataset:
        for side, values in rewards.items():
            with torch.no_grad():
                values.append(0.3 * naive_log_probs(model, row["prompt_ids"], row[f"{side}_ids"]).sum().item())
    for side, values in rewards.items():
        assert found[f"eval_rewards/{side}"] == pytest.approx(sum(values) / 4, rel=1e-5)
    margins = [c - r for c, r in zip(rewards["chosen"], rewards["rejected"], strict=True)]
    expected = sum(max(-m, 0) + math.log1p(math.exp(-abs(m))) for m in margins) / 4
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-5)
    trainer.train()


@pytest.mark.parametrize("option", ["sync_ref_model", "precompute_ref_log_probs", "ref_dtype", "ref_store"])
def test_reference_free_with_an_option_of_a_reference_is_refused(option: str, tmp_path: Path) -> None:
    value: Any = {"ref_dtype": "bfloat16", "ref_store": str(tmp_path / "s.sqlite")}.get(option, True)
    with pytest.raises(ConfigurationError, match=option):
        DPOConfig(str(tmp_path), report_to=[], reference_free=True, **{option: value})


def test_reference_free_with_a_reference_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="ref_model"):
        make_trainer(tmp_path, reference_free=True, ref_model=tiny_model())


# ---------------------------------------------------------------------------------------------------------- margins


def with_margins(rows: list[dict[str, Any]], margin: Any) -> list[dict[str, Any]]:
    return [row | {"margin": margin} for row in rows]


@pytest.mark.parametrize("shape", ["rows", "tokenized", "stream", "grouped by length", "padded"])
def test_a_margin_column_reaches_the_loss(shape: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """At the first step every reward margin is 0, so the loss is that of minus the margin."""
    rows: Any = with_margins(tiny_pairs(8), 0.75)
    options: dict[str, Any] = {}
    if shape == "tokenized":
        tokenized = make_trainer(tmp_path, rows=rows).train_dataset
        rows = tokenized.select_columns(["prompt_ids", "chosen_ids", "rejected_ids", "margin"])
    elif shape == "stream":
        rows = stream(rows)
    elif shape == "grouped by length":
        options = {"max_tokens_per_micro_batch": 200}
    elif shape == "padded":
        collator = DataCollatorForPreference(pad_token_id=0)
        options = {"data_collator": lambda rows: collator(rows)}  # a function's batches are taken apart
    trainer = trained(tmp_path, rows=rows, max_steps=1, **options)
    assert curve(trainer)[0] == pytest.approx(math.log1p(math.exp(0.75)), rel=1e-5)
    assert curve(trainer, "rewards/margins")[0] == pytest.approx(0, abs=1e-6)
    assert caplog.text.count("`margin` is subtracted") == (2 if shape == "tokenized" else 1)  # once for each trainer


def test_margins_belong_to_their_rows(tmp_path: Path) -> None:
    margins = [0.0, 1.0, -1.0, 4.0, 0.5, 2.0]
    rows = [row | {"margin": margin} for row, margin in zip(tiny_pairs(6), margins, strict=True)]
    found = make_trainer(tmp_path, eval_dataset=as_dataset(rows), per_device_eval_batch_size=4).evaluate()
    expected = sum(math.log1p(math.exp(margin)) for margin in margins) / 6
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("margin", [None, float("nan"), float("inf"), "much", True])
def test_a_margin_that_is_no_number_is_refused_by_its_row(margin: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Row 0 of the train set has `margin="):
        make_trainer(tmp_path, rows=with_margins(tiny_pairs(2), margin))


def test_bad_margins_are_counted_with_the_other_bad_rows_and_dropped_with_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = with_margins(tiny_pairs(5), 0.5)
    rows[1]["margin"] = rows[3]["margin"] = math.inf
    rows[4]["rejected"] = ""
    with pytest.raises(DataError, match=r"3 of 5 rows cannot be used(.|\n)*2: has `margin=inf`: .* \(rows 1, 3\)"):
        make_trainer(tmp_path, rows=rows)
    trainer = make_trainer(tmp_path, rows=rows, bad_rows="drop")
    assert trainer.train_dataset["margin"][:] == [0.5, 0.5]
    assert "2: has `margin=inf`: a margin must be a finite number (rows 1, 3)" in caplog.text


def test_a_margin_that_no_loss_reads_is_refused_at_construction(tmp_path: Path) -> None:
    for loss in ("ipo", "sppo_hard", "aot"):
        with pytest.raises(ConfigurationError, match="margin"):
            make_trainer(tmp_path, rows=with_margins(tiny_pairs(4), 1.0), loss_type=loss)


# -------------------------------------------------------------------------------------------- a loss of your own


def squared(scores: PairScores, options: LossOptions) -> Tensor:
    return (options.beta * scores.delta - 1).square()


def test_a_loss_of_ones_own_trains(tmp_path: Path) -> None:
    trainer = trained(tmp_path / "own", rows=tiny_pairs(4), loss=squared, max_steps=6, learning_rate=2e-4)
    assert curve(trainer)[0] == pytest.approx(1.0, abs=1e-5) and curve(trainer)[-1] < 0.99


def test_a_loss_of_ones_own_equals_the_named_one_it_calls(tmp_path: Path) -> None:
    named = trained(tmp_path / "named", loss_type="hinge", beta=0.5)
    own = trained(tmp_path / "own", loss=lambda scores, options: LOSSES["hinge"](scores, options), beta=0.5)
    assert same_bits(bits(own.model), bits(named.model))


def test_a_loss_of_ones_own_beside_a_named_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="loss_type"):
        make_trainer(tmp_path, loss=squared, loss_type="hinge")


# ------------------------------------------------------------------------------------------- BCO's state in a run


def test_reward_shift_is_refused_from_a_checkpoint_that_has_none(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trained(tmp_path, **saving)
    trainer = make_trainer(tmp_path, loss_type="bco_pair", max_steps=4, resume_changes=["loss_type"])
    with pytest.raises(ResumeError, match="bco_reward_shift"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_reward_shift_changes_the_curve_from_the_second_step_on(tmp_path: Path) -> None:
    with_shift, without = (
        trained(tmp_path / str(shift), loss_type="bco_pair", beta=0.5, bco_reward_shift=shift, learning_rate=5e-3)
        for shift in (True, False)
    )
    assert curve(with_shift)[0] == pytest.approx(2 * math.log(2), abs=1e-5) == curve(without)[0]
    assert abs(curve(with_shift)[2] - curve(without)[2]) > 1e-3
