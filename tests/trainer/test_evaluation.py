"""`compute_metrics`: what it is given, that nothing is built without it, and that no row is lost or comes twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PromptTuningConfig
from transformers import EvalPrediction, TrainerCallback

from support.observe import LargestTensor
from support.runs import DEFAULTS, as_dataset, make_trainer, trained
from support.tiny import tiny_model, tiny_pairs, tiny_tokenizer
from tether import DPOConfig, DPOTrainer
from tether.errors import ArgumentTypeError, ConfigurationError
from tether.trainer.evaluation import PairGather

pytestmark = pytest.mark.numerics

VOCABULARY = 256


class Keeping:
    """A `compute_metrics` that keeps what it was given."""

    def __init__(self) -> None:
        self.given: list[EvalPrediction] = []

    def __call__(self, given: EvalPrediction, **options: Any) -> dict[str, float]:
        self.given.append(given)
        return {"rows": float(len(given.label_ids)), "calls": float(len(self.given))}


def evaluated(folder: Path, size: int, num_pairs: int = 7, **options: Any) -> tuple[Keeping, dict[str, float], Any]:
    keeping = Keeping()
    trainer = make_trainer(
        folder,
        eval_dataset=as_dataset(tiny_pairs(num_pairs, seed=1)),
        per_device_eval_batch_size=size,
        compute_metrics=keeping,
        **options,
    )
    return keeping, trainer.evaluate(), trainer


def sequences(trainer: Any) -> list[tuple[list[int], list[int]]]:
    return [
        (row["prompt_ids"] + row["chosen_ids"], row["prompt_ids"] + row["rejected_ids"]) for row in trainer.eval_dataset
    ]


@pytest.mark.parametrize("size", [7, 4, 3])
def test_compute_metrics_gets_the_logits_of_every_sequence_once(size: int, tmp_path: Path) -> None:
    """In each batch the chosen and then the rejected sequences; the last batch is not whole for 4 and 3."""
    keeping, metrics, trainer = evaluated(tmp_path, size)
    (given,) = keeping.given
    assert given.predictions.shape == (14, given.label_ids.shape[1], VOCABULARY) and metrics["eval_rows"] == 14
    rows = sequences(trainer)
    expected = [
        rows[index][side]
        for start in range(0, 7, size)
        for side in (0, 1)
        for index in range(start, min(start + size, 7))
    ]
    model = trainer.model.eval()
    for ids, found, logits in zip(expected, given.label_ids, given.predictions, strict=True):
        assert found[: len(ids)].tolist() == ids
        with torch.no_grad():
            alone = model(torch.tensor([ids])).logits[0]
        np.testing.assert_allclose(logits[: len(ids)], alone.numpy(), atol=1e-3)  # 2e-4 under `OtherRounding(10)`


def test_evaluation_builds_no_logits_unless_it_is_asked_for_them(tmp_path: Path) -> None:
    """The widest tensor of evaluation is far from (sequences, tokens, vocabulary), and exactly that with metrics."""
    vocabulary = 20_000
    pairs = as_dataset(tiny_pairs(4, seed=1))
    sizes = {}
    for keeping in (None, Keeping()):
        model = tiny_model(vocab_size=vocabulary)
        trainer = make_trainer(
            tmp_path, model, eval_dataset=pairs, per_device_eval_batch_size=4, compute_metrics=keeping
        )
        trainer.evaluate()  # what is looked at once, at the start, is not evaluation
        with LargestTensor() as largest:
            trainer.evaluate()
        sizes[keeping is not None] = largest.num_elements
    width = max(len(ids) for pair in sequences(trainer) for ids in pair)
    assert sizes[True] >= 8 * width * vocabulary
    assert sizes[False] < sizes[True] / 10


EVERY_STEP = {"strategy": "steps", "steps": 1}


def test_metrics_are_logged_and_choose_the_best_checkpoint(tmp_path: Path) -> None:
    keeping = Keeping()
    trainer = trained(
        tmp_path,
        eval_dataset=as_dataset(tiny_pairs(4, seed=1)),
        compute_metrics=keeping,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="calls",
        greater_is_better=False,
    )
    assert [entry["eval_calls"] for entry in trainer.state.log_history if "eval_calls" in entry] == [1, 2, 3]
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    assert all("eval_rewards/margins" in entry for entry in trainer.state.log_history if "eval_calls" in entry)


class Figure(TrainerCallback):
    """A figure of a user's own, put to those of every evaluation."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        metrics["eval_mine"] = -float(state.global_step)


def test_a_callbacks_own_figure_may_choose_the_best_checkpoint(tmp_path: Path) -> None:
    options: dict[str, Any] = {f"{what}_{by}": value for what in ("save", "eval") for by, value in EVERY_STEP.items()}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "mine", "max_steps": 2}
    with pytest.raises(ConfigurationError, match="metric_for_best_model"):
        make_trainer(tmp_path, eval_dataset=as_dataset(tiny_pairs(4, seed=1)), **options)
    trainer = trained(tmp_path, eval_dataset=as_dataset(tiny_pairs(4, seed=1)), callbacks=[Figure()], **options)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1") and trainer.state.best_metric == -1


def test_logits_can_be_reduced_before_they_are_kept(tmp_path: Path) -> None:
    """To several tensors, one of them a number for each sequence: none of the 14 is lost."""

    def reduce(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert logits.shape[:2] == labels.shape
        return logits.argmax(-1), logits.logsumexp(-1)[:, 0]

    kept, _, _ = evaluated(tmp_path / "all", 4)
    reduced, _, _ = evaluated(tmp_path / "some", 4, preprocess_logits_for_metrics=reduce)
    best, first = reduced.given[0].predictions
    # Where the two batches are of other width, -100 fills the narrower one.
    assert (best == np.where(best == -100, -100, kept.given[0].predictions.argmax(-1))).all()
    np.testing.assert_allclose(first, np.log(np.exp(kept.given[0].predictions[:, 0]).sum(-1)), rtol=1e-5)
    assert first.shape == (14,)


def test_metrics_can_be_made_batch_by_batch(tmp_path: Path) -> None:
    class Counting:
        rows, finished = 0, 0

        def __call__(self, given: EvalPrediction, compute_result: bool) -> dict[str, float]:
            self.rows += len(given.label_ids)
            self.finished += compute_result
            return {"rows": float(self.rows)} if compute_result else {}

    counting = Counting()
    trainer = make_trainer(
        tmp_path,
        eval_dataset=as_dataset(tiny_pairs(7, seed=1)),
        per_device_eval_batch_size=4,
        compute_metrics=counting,
        batch_eval_metrics=True,
    )
    assert trainer.evaluate()["eval_rows"] == 14 and counting.finished == 1


def test_inputs_and_losses_are_included_where_asked_for(tmp_path: Path) -> None:
    keeping, metrics, _ = evaluated(tmp_path, 4, include_for_metrics=["inputs", "loss"])
    given = keeping.given[0]
    assert (given.inputs == given.label_ids).all()
    assert given.losses.shape == (7,) and metrics["eval_loss"] == pytest.approx(float(np.mean(given.losses)), abs=1e-6)


def test_virtual_tokens_of_a_prompt_adapter_are_left_out(tmp_path: Path) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    keeping, _, _ = evaluated(tmp_path, 4, peft_config=config)
    assert keeping.given[0].predictions.shape[:2] == keeping.given[0].label_ids.shape


def test_rows_are_padded_with_the_tokenizers_pad_token(tmp_path: Path) -> None:
    keeping, _, trainer = evaluated(tmp_path, 7, processing_class=tiny_tokenizer(pad=True))
    lengths = [len(ids) for side in (0, 1) for ids in (pair[side] for pair in sequences(trainer))]
    pad = trainer.processing_class.pad_token_id
    assert pad != trainer.processing_class.eos_token_id
    for row, length in zip(keeping.given[0].label_ids, lengths, strict=True):
        assert set(row[length:].tolist()) <= {pad}


def test_a_run_that_groups_its_rows_by_length_evaluates_all_of_them(tmp_path: Path) -> None:
    keeping, metrics, _ = evaluated(tmp_path, 4, train_sampling_strategy="group_by_length")
    assert len(keeping.given[0].label_ids) == 14 and metrics["eval_loss"] == pytest.approx(np.log(2), abs=1e-6)


class TwoProcesses:
    """Stands for accelerate in process 0 of 2; the other one's batch has a pair less."""

    def __init__(self, others: dict[int, torch.Tensor]) -> None:
        self._others = others  # by the number of dimensions

    def pad_across_processes(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor  # its own is the longer one

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor, self._others[tensor.ndim].to(tensor.dtype)])


@pytest.mark.parametrize(("others_count", "found"), [(1, [1, 2, 3, -1, -2, -3]), (0, [1, 2, -1, -2])])
def test_gathering_leaves_out_what_does_not_count(others_count: int, found: list[float]) -> None:
    """Two processes with 2 pairs and with 1, which may be there to fill up only; its second place is padding."""
    others = {1: torch.tensor([others_count, 0]), 2: torch.tensor([[3.0, -3.0], [0.0, 0.0]])}
    gathered = PairGather(TwoProcesses(others))
    gathered.begin_batch(torch.ones(2))
    assert gathered(torch.tensor([0.5, 0.5, 0.5])).shape == (len(found) // 2,)  # the loss, once for each pair
    assert gathered(torch.tensor([1.0, 2.0, -1.0, -2.0])).tolist() == found


def test_a_trainer_may_only_evaluate(tmp_path: Path) -> None:
    rows = tiny_pairs(6)
    alone = DPOTrainer(
        tiny_model(), args=DPOConfig(str(tmp_path), **DEFAULTS), eval_dataset=rows, processing_class=tiny_tokenizer()
    )
    found, expected = alone.evaluate(), make_trainer(tmp_path, eval_dataset=rows).evaluate()
    assert {name for name in expected if name.startswith("eval_")} == {
        name for name in found if name.startswith("eval_")
    }
    assert found["eval_loss"] == expected["eval_loss"] and found["eval_num_tokens"] == expected["eval_num_tokens"]
    with pytest.raises(ConfigurationError, match="Cannot train without `train_dataset`"):
        alone.train()
    with pytest.raises(ArgumentTypeError, match="`train_dataset` is required, and it is None"):
        DPOTrainer(tiny_model(), args=DPOConfig(str(tmp_path), **DEFAULTS), processing_class=tiny_tokenizer())
