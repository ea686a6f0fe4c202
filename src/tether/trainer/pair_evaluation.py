"""How sets are evaluated: figures of pairs, and logits where `compute_metrics` asks for them.

Overrides transformers' evaluation loop; decides nothing about scoring.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput

from tether.data.datasets import as_dataset, batch_of
from tether.losses.metrics import MetricSums
from tether.scoring.evaluation import running_in
from tether.trainer.evaluation import PairGather, full_evaluation, padded_logits
from tether.trainer.run_saving import RunSaving
from tether.trainer.sets import SetReader, check_ids, named_sets


class PairEvaluation(RunSaving):
    """The part of the trainer that evaluates."""

    _sets: SetReader
    _tokenizer: PreTrainedTokenizerBase
    _eval_sums: MetricSums
    _evaluation_dtype: torch.dtype | None

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        inputs = self._prepare_inputs(inputs)
        batch = batch_of(inputs)
        if isinstance(self.gather_function, PairGather):
            self.gather_function.begin_batch(inputs["pairs"])
        with torch.no_grad(), self.compute_loss_context_manager():
            loss: Any = self.compute_loss(model, inputs)
            if prediction_loss_only:
                return loss.detach(), None, None
            with self._precision():
                return loss.detach(), *padded_logits(model, batch, self._pad_token_id)

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        self._eval_sums = MetricSums()
        self.gather_function = PairGather(self.accelerator)
        with full_evaluation(self.args) as self._evaluation_dtype:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        means = self._eval_sums.means(self._sum_over_processes)
        if not self.loss_is_scaled_for_ga:
            means.pop("loss", None)  # what was put in the place of `compute_loss` says it
        assert output.metrics is not None
        means["num_tokens"] = self._sum_tokens()
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluates the sets given at construction, or new ones (rows of text, or tokenized)."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._new_sets(eval_dataset)
        metrics: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        return metrics

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Metrics, logits and token ids of a set (rows of text, or tokenized), at any time.

        The logits of the whole set are kept: `prediction_loss_only=True` leaves them out.
        """
        return super().predict(self._new_sets(as_dataset(test_dataset)), ignore_keys, metric_key_prefix)

    def _new_sets(self, sets: Any) -> Any:
        """Sets that were not given at construction, tokenized and made known to the reference."""
        tokenized = self._sets.read_all(sets)
        if tokenized is not self.eval_dataset:
            sets = named_sets(None, tokenized)
            check_ids(sets, self.accelerator.unwrap_model(self.model))
            self._reference_run.prepare(sets)
        return tokenized

    def _precision(self) -> AbstractContextManager[Any]:
        """Of the policy's forward alone: the reference answers as it does in training."""
        return running_in(None if self.model.training else self._evaluation_dtype, self.args.device)

    @property
    def _pad_token_id(self) -> int:
        return int(self._tokenizer.pad_token_id or 0)
