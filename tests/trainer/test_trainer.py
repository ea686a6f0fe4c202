"""A run, from pairs to a trained policy: the first loss, equal curves, TRL's curves, figures, and what is held."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback

from support.observe import bits, same_bits, tensor_bytes_alive, traces
from support.runs import as_dataset, curve, differences, make_trainer, shared_names, steps, stream, trained
from support.tiny import naive_log_probs, tiny_model, tiny_pairs, tiny_tokenizer
from support.trl_oracle import trl_curve, trl_evaluation
from tether import DPOConfig
from tether.errors import ConfigurationError, DataError, MissingLogProbsError, ReferenceModelError
from tether.losses.metrics import MetricSums, pair_metrics
from tether.scoring import score
from tether.types import PairBatch, PairScores, Response, ResponseLogProbs

pytestmark = pytest.mark.numerics

LORA: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
SYNC: dict[str, Any] = {"sync_ref_model": True, "ref_model_sync_steps": 3, "ref_model_mixup_alpha": 0.5}
PRECOMPUTE: dict[str, Any] = {"precompute_ref_log_probs": True}


def adapted(seed: int = 0, base: Any = None, **options: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(tiny_model() if base is None else base, LoraConfig(**LORA | options))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model and its tokenizer on disk."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


# ------------------------------------------------------------------------------------------------- the first loss

INITIAL: dict[str, Callable[[], dict[str, Any]]] = {
    "explicit": lambda: {},
    "explicit, given": lambda: {"ref_model": tiny_model()},
    "precomputed": lambda: PRECOMPUTE,
    "synchronized": lambda: SYNC,
    "fresh LoRA": lambda: {"peft_config": LoraConfig(**LORA)},
    "fresh LoRA, explicit": lambda: {"peft_config": LoraConfig(**LORA), "ref_model": tiny_model()},
    "fresh LoRA, precomputed": lambda: {"peft_config": LoraConfig(**LORA)} | PRECOMPUTE,
    "continued LoRA": lambda: {"model": adapted(init_lora_weights=False)},
    "continued LoRA, precomputed": lambda: {"model": adapted(init_lora_weights=False)} | PRECOMPUTE,
    "PiSSA": lambda: {"model": adapted(init_lora_weights="pissa")},
    "instance changed in memory": lambda: {"model": changed_in_memory()},
}


def changed_in_memory() -> Any:
    """A model that is no longer what its name says: a reference loaded by name would be another one."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    return model


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"bf16": True, "use_cpu": True}], ids=str)
@pytest.mark.parametrize("kind", INITIAL)
def test_training_starts_at_log_2_with_rewards_of_0(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    trainer = trained(tmp_path, max_steps=1, **INITIAL[kind](), **options)
    (first,) = steps(trainer)
    # Precomputed in other batches, and products round by the shape of the batch: 5e-6 under `OtherRounding(3)`.
    tolerance = (0.02 if "bf16" in options else 1e-5) if "precomputed" in kind else 1e-6
    assert first["loss"] == pytest.approx(math.log(2), abs=tolerance)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert first[name] == pytest.approx(0, abs=tolerance)


# ---------------------------------------------------------------------------------------------------- equal curves


def test_static_references_give_the_same_curve_for_the_full_model(tmp_path: Path) -> None:
    variants = ({}, {"ref_model": tiny_model()}, PRECOMPUTE, {"gradient_checkpointing": True})
    runs = [trained(tmp_path / str(number), max_steps=20, **options) for number, options in enumerate(variants)]
    assert max(curve(runs[0])) - min(curve(runs[0])) > 0.2, "nothing was learnt: the curves say little"
    for other in runs[1:]:
        assert curve(other) == pytest.approx(curve(runs[0]), abs=1e-4)


def test_static_references_give_the_same_curve_for_lora(tmp_path: Path) -> None:
    variants = ({}, {"ref_model": tiny_model()}, PRECOMPUTE, {"gradient_checkpointing": True})
    runs = [
        trained(tmp_path / str(number), model=adapted(), max_steps=20, learning_rate=1e-2, **options)
        for number, options in enumerate(variants)
    ]
    assert max(curve(runs[0])) - min(curve(runs[0])) > 0.2, "nothing was learnt: the curves say little"
    for other in runs[1:]:
        assert curve(other) == pytest.approx(curve(runs[0]), abs=1e-4)


# Over several batches these are means over all tokens; TRL weighs batches alike, however many tokens they have.
TOKEN_MEANS = {"entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy"}


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": ["sigmoid"]},
        {"loss_type": ["sigmoid"], "gradient_checkpointing": True, "gradient_accumulation_steps": 2},
        {"loss_type": ["hinge"], "beta": 0.5},
        {"loss_type": ["ipo"], "max_length": 60},
        {"loss_type": ["sigmoid", "hinge"], "loss_weights": [0.3, 2.0], "max_steps": 4},
        SYNC | {"loss_type": ["sigmoid"]},
        {"loss_type": ["sigmoid"], "lora": True, "learning_rate": 1e-2},
    ],
    ids=lambda options: ", ".join(f"{name}={value}" for name, value in options.items()),
)
def test_training_curves_equal_those_of_trl(options: dict[str, Any], model_folder: str, tmp_path: Path) -> None:
    rows = tiny_pairs(32 if "gradient_accumulation_steps" in options else 30)  # TRL takes means of unequal batches
    options = {
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "max_steps": 10,
        "logging_steps": 1,
        "gradient_checkpointing": False,
    } | options
    config = {"peft_config": LoraConfig(**LORA)} if options.pop("lora", False) else {}
    theirs = trl_curve(model_folder, rows, tiny_tokenizer(), tmp_path / "trl", **options, **config)
    ours = steps(trained(tmp_path / "tether", model_folder, rows, **options, **config))
    for our_entry, their_entry in zip(ours[:2], theirs[:2], strict=True):
        assert shared_names(our_entry) == their_entry.keys()
    for name, difference in differences(ours, theirs).items():
        if name in TOKEN_MEANS and "gradient_accumulation_steps" in options:
            continue
        size = max(abs(entry[name]) for entry in theirs)
        assert difference <= 1e-4 * max(1, size), name


def test_evaluation_figures_equal_those_of_trl(model_folder: str, tmp_path: Path) -> None:
    rows = tiny_pairs(8, seed=1)  # whole batches: TRL's figures are means of batches
    theirs = trl_evaluation(model_folder, tiny_pairs(8), rows, tiny_tokenizer(), tmp_path / "trl")
    ours = make_trainer(
        tmp_path / "ours", model_folder, eval_dataset=as_dataset(rows), per_device_eval_batch_size=4
    ).evaluate()
    timing = {name for name in (*ours, *theirs) if "runtime" in name or "per_second" in name or "preparation" in name}
    assert shared_names(ours) - timing == theirs.keys() - timing
    for name in theirs.keys() - timing - {f"eval_{name}" for name in TOKEN_MEANS}:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), name


# --------------------------------------------------------------------------------------------------------- figures


def test_accumulated_ragged_batches_equal_one_large_batch(tmp_path: Path) -> None:
    """7 pairs as 7, as 4 + 3, and as seven of 1: the same loss and the same step."""
    rows = tiny_pairs(7)
    runs = [
        trained(
            tmp_path / str(size),
            rows=rows,
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=math.ceil(7 / size),
            optim="sgd",
            learning_rate=1e-2,
            loss_type="ipo",  # a loss whose pairs differ at the first step
        )
        for size in (7, 4, 1)
    ]
    whole = bits(runs[0].model)
    assert not same_bits(whole, bits(tiny_model()))
    for other in runs[1:]:
        for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen", "entropy"):
            assert curve(other, name) == pytest.approx(curve(runs[0], name), rel=1e-5, abs=1e-5), name
        for name, weight in bits(other.model).items():
            torch.testing.assert_close(weight, whole[name], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 7])
def test_evaluation_figures_are_means_over_the_pairs_whatever_the_batches(batch_size: int, tmp_path: Path) -> None:
    rows = tiny_pairs(7, seed=1)
    trainer = trained(
        tmp_path, max_steps=2, eval_dataset=as_dataset(rows), per_device_eval_batch_size=batch_size, beta=0.3
    )
    found = trainer.evaluate()
    policy, reference = trainer.model.eval(), tiny_model()
    chosen: list[float] = []
    rejected: list[float] = []
    entropies: list[float] = []
    for row in trainer.eval_dataset:
        for side, rewards in (("chosen_ids", chosen), ("rejected_ids", rejected)):
            prompt, tokens = row["prompt_ids"], row[side]
            with torch.no_grad():
                ratios = naive_log_probs(policy, prompt, tokens) - naive_log_probs(reference, prompt, tokens)
                probabilities = policy(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].softmax(-1)
            rewards.append(0.3 * ratios.sum().item())
            entropies += (-(probabilities * probabilities.log()).sum(-1)).tolist()
    margins = [c - r for c, r in zip(chosen, rejected, strict=True)]
    expected = {
        "eval_rewards/chosen": sum(chosen) / 7,
        "eval_rewards/rejected": sum(rejected) / 7,
        "eval_rewards/margins": sum(margins) / 7,
        "eval_rewards/accuracies": sum(margin > 0 for margin in margins) / 7,
        "eval_loss": sum(math.log1p(math.exp(-margin)) for margin in margins) / 7,
        "eval_entropy": sum(entropies) / len(entropies),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_training_metrics_are_means_over_the_steps_since_the_last_log(tmp_path: Path) -> None:
    every = trained(tmp_path / "1", max_steps=6)
    third = trained(tmp_path / "3", max_steps=6, logging_steps=3)
    assert len(steps(third)) == 2
    for name in ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "entropy", "mean_token_accuracy"):
        means = [sum(curve(every, name)[start : start + 3]) / 3 for start in (0, 3)]
        assert curve(third, name) == pytest.approx(means, rel=1e-5, abs=1e-6)
    assert curve(third, "num_tokens") == [curve(every, "num_tokens")[step] for step in (2, 5)]


def test_a_tied_pair_is_one_whose_margin_may_be_rounding(tmp_path: Path) -> None:
    """1e-5 nats for each token of the two responses, times beta: for 10 tokens at beta 0.5, a margin of 5e-5."""
    margins = torch.tensor([0.0, 4e-5, -4e-5, 6e-5, -6e-5, 0.3])
    zeros, lengths = torch.zeros(6), torch.full((6,), 5)
    scores = PairScores(margins / 0.5, zeros, zeros, zeros, lengths, lengths)
    sums = MetricSums()
    batch = PairBatch.of_pairs([(Response((1,), (2,)), Response((1,), (3,)))] * 6)
    policy = ResponseLogProbs(torch.zeros(batch.num_responses), torch.arange(batch.num_responses + 1))
    for _ in range(2):
        sums.add(pair_metrics(batch, scores, zeros, 0.5, policy), 5)
    found = sums.means()
    assert (found["pairs/tied"], found["pairs/total"]) == (6, 10)
    assert found["rewards/accuracies"] == pytest.approx(0.4)  # as TRL has it: a tie is not right


def test_a_margin_within_the_noise_of_stored_answers_is_a_tie_too() -> None:
    """Three tokens at p = 1/2, each off by 0.1 times 1/2: a standard deviation of 0.0868, twice that, times beta."""
    margins, lengths = torch.tensor([0.08, -0.08, 0.09, -0.09]), torch.tensor([2, 2, 2, 2])
    scores = PairScores(margins / 0.5, *torch.zeros(3, 4), lengths, lengths - 1)
    batch = PairBatch.of_pairs([(Response((1,), (2, 3)), Response((1,), (4,)))] * 4)
    policy = ResponseLogProbs(torch.tensor([0.5, 0.5, 0.5]).log(), torch.tensor([0, 2, 3]))
    for spread, tied in ((0.1, [1, 1, 0, 0]), (0.0, [0, 0, 0, 0])):
        found, _ = pair_metrics(batch, scores, torch.zeros(4), 0.5, policy, spread)["pairs/tied"]
        assert found.tolist() == tied


def test_tied_pairs_are_counted_in_the_window_and_in_the_set(tmp_path: Path) -> None:
    rows = tiny_pairs(8)
    rows[0]["rejected"] = rows[0]["chosen"]  # tied whatever the policy is
    trainer = make_trainer(
        tmp_path, rows=rows, max_steps=6, logging_steps=2, learning_rate=1e-2, eval_dataset=as_dataset(rows[:7]),
        per_device_eval_batch_size=4, train_sampling_strategy="sequential",
    )  # fmt: skip
    assert trainer.evaluate().items() >= {"eval_pairs/tied": 7, "eval_pairs/total": 7}.items()
    trainer.train()
    assert trainer.evaluate().items() >= {"eval_pairs/tied": 1, "eval_pairs/total": 7}.items()
    # All four of the first step, and then the one, in each epoch of two steps.
    assert curve(trainer, "pairs/tied") == [4, 1, 1]
    assert curve(trainer, "pairs/total") == [8, 8, 8]


def test_metrics_of_evaluation_and_training_do_not_mix(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 6, "logging_steps": 3}
    evaluation = {"eval_dataset": as_dataset(tiny_pairs(5, seed=1)), "eval_strategy": "steps", "eval_steps": 1}
    plain, evaluating = trained(tmp_path / "1", **options), trained(tmp_path / "2", **options, **evaluation)
    assert differences(steps(plain), steps(evaluating))["rewards/margins"] == 0.0
    assert differences(steps(plain), steps(evaluating))["entropy"] == 0.0


def test_several_losses_are_added_with_their_weights(tmp_path: Path) -> None:
    both = trained(tmp_path / "both", max_steps=1, loss_type=["sigmoid", "ipo"], loss_weights=[2.0, 0.5], beta=0.25)
    assert curve(both)[0] == pytest.approx(2 * math.log(2) + 0.5 * (1 / (2 * 0.25)) ** 2, rel=1e-6)


def test_label_smoothing_reaches_the_loss(tmp_path: Path) -> None:
    smoothed, plain = (
        trained(tmp_path / str(eps), max_steps=4, learning_rate=5e-3, label_smoothing=eps) for eps in (0.4, 0.0)
    )
    assert curve(smoothed)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert curve(smoothed)[2] != pytest.approx(curve(plain)[2], abs=1e-3)


# -------------------------------------------------------------------------------------------------- what is held


class BytesWhileTraining(TrainerCallback):
    """Bytes of all tensors alive at the start of the second step: no gradients, no activations, no optimizer state."""

    def __init__(self) -> None:
        self.num_bytes = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.num_bytes = tensor_bytes_alive()


def held_beyond_the_policy(tmp_path: Path, model: Any, **options: Any) -> tuple[float, int]:
    """Extra bytes while training, as a share of the policy's; and those that the reference says it holds."""
    watch = BytesWhileTraining()
    policy_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    before = tensor_bytes_alive() - policy_bytes
    options = {"optim": "sgd", "callbacks": [watch], "max_steps": 2, "rows": tiny_pairs(8)} | options
    trainer = trained(tmp_path, model, **options)
    if "peft_config" in options:
        policy_bytes = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    return (watch.num_bytes - before - policy_bytes) / policy_bytes, trainer.reference.extra_bytes


@pytest.mark.parametrize("kind", ["fresh LoRA", "fresh LoRA, precomputed", "precomputed"])
def test_implicit_and_precomputed_references_hold_no_second_set_of_weights(kind: str, tmp_path: Path) -> None:
    share, extra_bytes = held_beyond_the_policy(tmp_path, tiny_model(hidden=128, layers=3), **INITIAL[kind]())
    assert extra_bytes == 0 and share < 0.03


def test_explicit_reference_holds_the_trainable_weights_twice_and_no_others(tmp_path: Path) -> None:
    model = tiny_model(hidden=128, layers=3)
    model.get_input_embeddings().requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    policy_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    trainable = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    share, extra_bytes = held_beyond_the_policy(tmp_path, model)
    assert extra_bytes == trainable
    assert trainable / policy_bytes <= share < trainable / policy_bytes + 0.03


def test_reference_passes_of_a_run_are_counted(tmp_path: Path) -> None:
    options: dict[str, Any] = {"rows": tiny_pairs(8), "max_steps": 4, "per_device_train_batch_size": 2}
    assert trained(tmp_path / "1", **options).reference.num_passes == 4 + 2  # and the rows looked at before the first
    # Each row once, before training, and more of them at a time than training takes.
    assert trained(tmp_path / "2", **options, **PRECOMPUTE).reference.num_passes == 1


# ------------------------------------------------------------------------------------------------------ the store


def test_a_store_is_reused_by_a_run_with_other_options_and_other_row_order(tmp_path: Path) -> None:
    rows = tiny_pairs(12)
    first = trained(tmp_path / "first", rows=rows, **PRECOMPUTE)
    assert first.reference.num_passes > 0
    options: dict[str, Any] = PRECOMPUTE | {"learning_rate": 0.1, "beta": 0.7, "seed": 9, "loss_type": "ipo"}
    others = [
        trained(tmp_path / "other", rows=rows[::-1], per_device_train_batch_size=3, **options),
        trained(tmp_path / "shorter", rows=rows, max_length=50, **options),
        trained(tmp_path / "lora", rows=rows, peft_config=LoraConfig(**LORA), **options),
    ]
    assert [other.reference.num_passes for other in others] == [0, 0, 0]
    assert all(math.isfinite(loss) for other in others for loss in curve(other))


def test_a_store_computes_only_the_rows_it_lacks(tmp_path: Path) -> None:
    rows = tiny_pairs(12)
    options = PRECOMPUTE | {"per_device_train_batch_size": 4, "max_steps": 1}
    trained(tmp_path / "some", rows=rows[:8], **options)
    assert trained(tmp_path / "all", rows=rows, **options).reference.num_passes == 1


def test_a_store_of_its_own_is_kept_where_the_option_says(tmp_path: Path) -> None:
    options = PRECOMPUTE | {"max_steps": 1, "ref_store": str(tmp_path / "mine.sqlite")}
    assert trained(tmp_path / "1", **options).reference.num_passes > 0
    assert (tmp_path / "mine.sqlite").is_file()
    assert trained(tmp_path / "2", **options).reference.num_passes == 0
    assert trained(tmp_path / "3", **PRECOMPUTE | {"max_steps": 1}).reference.num_passes > 0


def test_precomputing_covers_evaluation_sets_even_one_that_is_called_train(tmp_path: Path) -> None:
    sets = {"train": as_dataset(tiny_pairs(4, seed=1)), "other": as_dataset(tiny_pairs(4, seed=2))}
    trainer = make_trainer(tmp_path, max_steps=2, eval_dataset=sets, **PRECOMPUTE)
    passes = trainer.reference.num_passes
    trainer.train()
    metrics = trainer.evaluate()
    assert {"eval_train_loss", "eval_other_loss"} <= metrics.keys()
    assert trainer.reference.num_passes == passes


# --------------------------------------------------------------------------------------------------- kinds of input


def test_a_stream_trains_like_the_rows_it_gives(tmp_path: Path) -> None:
    rows = tiny_pairs(12)
    streamed = trained(tmp_path / "stream", rows=stream(rows))
    listed = trained(tmp_path / "list", rows=rows, train_sampling_strategy="sequential")
    assert curve(streamed) == pytest.approx(curve(listed), abs=1e-6)


def test_a_stream_is_precomputed_on_the_way(tmp_path: Path) -> None:
    plain = trained(tmp_path / "plain", rows=stream(tiny_pairs(12)))
    stored = trained(tmp_path / "stored", rows=stream(tiny_pairs(12)), **PRECOMPUTE)
    assert curve(stored) == pytest.approx(curve(plain), abs=1e-5) and stored.reference.num_passes >= 3
    again = trained(tmp_path / "again", rows=stream(tiny_pairs(12)), **PRECOMPUTE)
    assert curve(again) == pytest.approx(curve(plain), abs=1e-5) and again.reference.num_passes == 0


def test_a_bad_row_of_a_stream_is_named_when_training_reads_it(tmp_path: Path) -> None:
    rows = [*tiny_pairs(9), {"prompt": "a", "chosen": "b", "rejected": ""}]
    trainer = make_trainer(tmp_path, rows=stream(rows))
    with pytest.raises(DataError, match="Row 9 of the train set has an empty `rejected`"):
        trainer.train()
    assert trainer.state.global_step < 3


def test_an_evaluation_stream_is_evaluated(tmp_path: Path) -> None:
    rows = tiny_pairs(6, seed=1)
    streamed, listed = (
        make_trainer(tmp_path, eval_dataset=dataset, per_device_eval_batch_size=4).evaluate()
        for dataset in (stream(rows), as_dataset(rows))
    )
    assert streamed["eval_logps/chosen"] == pytest.approx(listed["eval_logps/chosen"], rel=1e-6)


@pytest.mark.parametrize("conversational", [False, True])
def test_rows_of_every_shape_train(conversational: bool, tmp_path: Path) -> None:
    rows = tiny_pairs(8, conversational)
    implicit = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows]
    for number, shape in enumerate((rows, implicit)):
        trainer = trained(tmp_path / str(number), rows=shape, max_steps=2)
        assert curve(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)


def test_a_dict_of_evaluation_sets_is_evaluated_by_name(tmp_path: Path) -> None:
    sets = {"easy": as_dataset(tiny_pairs(4, seed=1)), "hard": as_dataset(tiny_pairs(4, seed=2))}
    metrics = trained(tmp_path, eval_dataset=sets, max_steps=1).evaluate()
    alone = trained(tmp_path, eval_dataset=sets["hard"], max_steps=1).evaluate()
    assert metrics["eval_hard_logps/chosen"] == pytest.approx(alone["eval_logps/chosen"], rel=1e-6)
    assert metrics["eval_easy_logps/chosen"] != metrics["eval_hard_logps/chosen"]


def test_a_tokenized_set_is_taken_as_it_is_and_loses_rows_whose_prompt_fills_max_length(tmp_path: Path) -> None:
    text = make_trainer(tmp_path, max_length=None)
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    tokenized = text.train_dataset.select_columns(columns)
    again = make_trainer(tmp_path, rows=tokenized, max_length=30)
    kept = again.train_dataset.select_columns(columns)
    assert kept[:] == make_trainer(tmp_path, max_length=30).train_dataset.select_columns(columns)[:]
    assert 0 < len(again.train_dataset) < len(tokenized)


def test_model_tokenizer_and_reference_may_be_paths(model_folder: str, tmp_path: Path) -> None:
    by_path = trained(tmp_path / "1", model_folder, processing_class=None, ref_model=model_folder)
    assert by_path.model.dtype == torch.float32
    assert curve(by_path) == pytest.approx(curve(trained(tmp_path / "2")), abs=1e-6)


def test_model_init_kwargs_shape_a_model_given_by_path(model_folder: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, model_folder, model_init_kwargs={"dtype": "bfloat16"})
    assert trainer.model.dtype == torch.bfloat16
    with pytest.raises(ConfigurationError, match="model_init_kwargs"):
        make_trainer(tmp_path, model_init_kwargs={"dtype": "bfloat16"})


def test_a_tokenizer_without_pad_token_pads_with_eos(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.pad_token is None
    trainer = trained(tmp_path, processing_class=tokenizer, max_steps=1)
    assert trainer.processing_class.pad_token == trainer.processing_class.eos_token
    own = tiny_tokenizer(pad=True)
    assert make_trainer(tmp_path, processing_class=own).processing_class.pad_token == "<pad>"


def test_bf16_by_default_follows_the_machine(tmp_path: Path) -> None:
    def dtype(**options: Any) -> str:
        return make_trainer(tmp_path, **options).reference.identity.compute_dtype

    args = DPOConfig(str(tmp_path), report_to=[])
    assert args.bf16 is torch.cuda.is_available() and (dtype() == "bfloat16") is args.bf16
    assert dtype(use_cpu=True, bf16=True) == "bfloat16"
    assert dtype(use_cpu=True) == "float32"


def test_an_adapter_made_from_a_config_starts_from_the_seed(tmp_path: Path) -> None:
    def initial(seed: int) -> dict[str, torch.Tensor]:
        torch.rand(seed + 1)  # whatever the random state before
        return bits(make_trainer(tmp_path, peft_config=LoraConfig(**LORA), seed=seed).model)

    assert same_bits(initial(1), initial(1)) and not same_bits(initial(1), initial(2))


def test_dropout_is_off_by_default_and_the_reference_has_none_in_any_case(tmp_path: Path) -> None:
    def gpt2() -> Any:
        return tiny_model("gpt2", resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)

    quiet = trained(tmp_path / "1", gpt2(), max_steps=1)
    noisy = trained(tmp_path / "2", gpt2(), max_steps=1, disable_dropout=False)
    assert curve(quiet)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert curve(noisy)[0] != pytest.approx(math.log(2), abs=1e-2)
    batch = PairBatch.of_pairs([(Response((5, 6), (7, 8)), Response((5, 6), (9,)))])
    for trainer in (quiet, noisy):
        expected = score(gpt2(), batch).values.detach()
        assert torch.equal(trainer.reference.log_probs(batch).values, expected)


# ------------------------------------------------------------------------------------ the reference of a trainer


def test_null_ref_context_makes_an_adapter_model_its_own_reference(tmp_path: Path) -> None:
    trainer = trained(tmp_path, model=adapted(init_lora_weights=False, bias="lora_only"), learning_rate=0.05)
    ids = torch.tensor([[5, 6, 7, 8]])
    initial = adapted(init_lora_weights=False).eval()
    trainer.model.eval()
    with torch.no_grad():
        assert not torch.allclose(trainer.model(ids).logits, initial(ids).logits, atol=1e-3)
        with trainer.null_ref_context():
            torch.testing.assert_close(trainer.model(ids).logits, initial(ids).logits)
    assert trainer.ref_model is None


def test_null_ref_context_of_a_full_model_is_an_error(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    assert trainer.ref_model is not None
    with pytest.raises(ReferenceModelError, match="null_ref_context"), trainer.null_ref_context():
        pass


def test_a_given_reference_model_stays_what_it_was(tmp_path: Path) -> None:
    for number, options in enumerate(({}, SYNC | {"ref_model_sync_steps": 1}, {"ref_dtype": "bfloat16"}, PRECOMPUTE)):
        other = tiny_model(seed=1).train()
        before, numbers = traces(other), bits(other)
        trained(tmp_path / str(number), ref_model=other, **options)
        assert traces(other) == before and same_bits(bits(other), numbers)


def test_a_reference_with_a_padded_embedding_is_fine(tmp_path: Path) -> None:
    trainer = trained(tmp_path, ref_model=tiny_model(vocab_size=320, seed=1), max_steps=1)
    assert math.isfinite(curve(trainer)[0])


def test_synchronized_reference_moves_after_the_optimizer_step(tmp_path: Path) -> None:
    """With alpha = 1 at every step the reference is the policy: each loss is log 2 again."""
    trainer = trained(tmp_path, sync_ref_model=True, ref_model_mixup_alpha=1.0, ref_model_sync_steps=1, max_steps=4)
    assert curve(trainer) == pytest.approx([math.log(2)] * 4, abs=1e-6)
    other = trained(tmp_path, sync_ref_model=True, ref_model_mixup_alpha=1.0, ref_model_sync_steps=2, max_steps=4)
    assert curve(other)[0::2] == pytest.approx([math.log(2)] * 2, abs=1e-6)
    assert abs(curve(other)[1] - math.log(2)) > 1e-3 < abs(curve(other)[3] - math.log(2))


def test_synchronized_reference_counts_optimizer_steps_not_micro_batches(tmp_path: Path) -> None:
    options = {"sync_ref_model": True, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 2}
    trainer = trained(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=5, **options)
    assert trainer.reference.num_syncs == 2  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------- evaluating a new set


@pytest.mark.parametrize("kind", ["explicit", "fresh LoRA", "fresh LoRA, precomputed", "synchronized"])
def test_a_new_set_can_be_evaluated_after_training(kind: str, tmp_path: Path) -> None:
    trainer = trained(tmp_path, **INITIAL[kind]())
    metrics = trainer.evaluate(as_dataset(tiny_pairs(5, seed=3)))
    assert math.isfinite(metrics["eval_loss"]) and metrics["eval_rewards/margins"] != 0
    assert trainer.evaluate({"new": as_dataset(tiny_pairs(5, seed=3))})["eval_new_loss"] == metrics["eval_loss"]


def test_a_new_set_without_stored_log_probs_is_an_error_once_the_reference_was_released(tmp_path: Path) -> None:
    trainer = trained(tmp_path, rows=tiny_pairs(8), **PRECOMPUTE)
    assert math.isfinite(trainer.evaluate(as_dataset(tiny_pairs(8)))["eval_loss"])  # all its rows are known
    with pytest.raises(MissingLogProbsError) as caught:
        trainer.evaluate(as_dataset(tiny_pairs(5, seed=3)))
    assert "eval_dataset" in caught.value.instead


# ------------------------------------------------------------------------------------------------ what is left


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_training_leaves_a_model_that_is_saved_and_loaded_as_any_other(
    gradient_checkpointing: bool, tmp_path: Path
) -> None:
    model = tiny_model()
    implementation, forward = model.config._attn_implementation, model.lm_head.forward
    trainer = trained(tmp_path / "run", model, gradient_checkpointing=gradient_checkpointing)
    assert trainer.model is model and type(model) is type(tiny_model())
    assert model.config._attn_implementation == implementation and model.lm_head.forward == forward
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    assert loaded.state_dict().keys() == tiny_model().state_dict().keys()


def test_a_trained_adapter_is_saved_and_loaded_as_any_other(tmp_path: Path) -> None:
    trainer = trained(tmp_path / "run", adapted(bias="lora_only"), learning_rate=0.05, gradient_checkpointing=True)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "saved"))
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(loaded.eval()(ids).logits, trainer.model.eval()(ids).logits)


def test_training_leaves_the_attention_as_it_was_when_it_fails(tmp_path: Path) -> None:
    model = tiny_model()
    implementation = model.config._attn_implementation
    trainer = make_trainer(tmp_path, model, rows=stream([*tiny_pairs(5), {"prompt": "a"}]), gradient_checkpointing=True)
    with pytest.raises(DataError):
        trainer.train()
    assert model.config._attn_implementation == implementation


def test_the_policy_is_not_copied_by_the_trainer(tmp_path: Path) -> None:
    model = tiny_model()
    pointers = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    trained(tmp_path, model)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == pointers
    assert not same_bits(bits(model), bits(tiny_model()))
