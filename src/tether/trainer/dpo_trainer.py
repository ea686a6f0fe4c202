"""`DPOTrainer`: the training loop of transformers with a reference in it.

Orchestrates; decides nothing about references (`build_reference` does), losses or scoring.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from transformers.modeling_outputs import CausalLMOutput
from transformers.trainer_utils import EvalPrediction

from tether.config.dpo_config import DPOConfig
from tether.config.rules.arguments import with_known_names
from tether.config.rules.run import refused_run, router_coefficient
from tether.data.collators import Collator
from tether.data.datasets import Rows, batch_of
from tether.distributed import autocast_dtype, cast_as_training_will, check_alike, raising_together, sharding_of
from tether.errors import ConfigurationError
from tether.losses import PreferenceLoss
from tether.losses.metrics import MetricSums, pair_metrics
from tether.models.finite import LossWatch
from tether.reference import Reference
from tether.reference.adapter_tensors import is_adapter_model
from tether.refusals import refuse
from tether.scoring import restore_attention, score
from tether.trainer.build_reference import (
    build_reference,
    check_own,
    follow_average,
    refused_holes,
    refused_own,
    waits_for_device,
)
from tether.trainer.evaluation import full_evaluation, padded_logits
from tether.trainer.pair_evaluation import PairEvaluation
from tether.trainer.pair_loading import EpochsOfBatches, PairLoading
from tether.trainer.reference_note import source_name
from tether.trainer.reference_run import ReferenceRun
from tether.trainer.run_folder import RunFolder
from tether.trainer.samples import SampleReport
from tether.trainer.saving import try_saving, without_token_notice
from tether.trainer.sets import named_sets
from tether.trainer.setup import Asked, Checked, check, naming_options, prepare
from tether.trainer.trl_attributes import OptionsAsAttributes
from tether.types import scored_tokens

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


class DPOTrainer(OptionsAsAttributes, PairLoading, PairEvaluation):
    """Trains a language model on preference pairs against a reference.

    Direct Preference Optimization, Rafailov et al. 2023, arXiv 2305.18290. Takes TRL's arguments. The reference
    follows from them:

    | you write | the reference |
    | --- | --- |
    | nothing | explicit: a frozen copy of the policy as it is in memory now |
    | `ref_model=...` | explicit: that model |
    | `peft_config=...`, or a `PeftModel` | implicit: the policy with its adapter off, or as it was at the start |
    | `precompute_ref_log_probs=True` | precomputed: one of the above, scored once and kept on disk |
    | `sync_ref_model=True` | synchronized (TR-DPO): a copy that moves towards the policy every few steps |
    | `BEMACallback(update_ref_model=True)` | BEMA: a copy that takes the policy's bias-corrected average |
    | columns `ref_chosen_logps`, `ref_rejected_logps` | given: the sums in the rows |
    | `reference_free=True` | reference-free: log-prob 0 for every response |
    | `reference=...` | your own: the object that is passed, or what a function makes of the policy |

    Args:
        model: The policy: a path or name, a `PreTrainedModel`, or a `PeftModel`.
        ref_model: The reference model, or a path to one; by default the policy as it is now.
        args: The options; by default `DPOConfig` with an output folder named after the model.
        data_collator: A collator of your own that returns the padded batches of `DataCollatorForPreference`. The
            default pads nothing and needs no padding token.
        train_dataset: Rows with `prompt`, `chosen`, `rejected` (text or messages), or without `prompt`; for a model
            that reads them with `image` or `images`. May be left out if the trainer only evaluates.
        eval_dataset: The same, or a dict of named sets.
        processing_class: The tokenizer, or the processor of a vision-language model; by default the one beside the
            model.
        compute_metrics: Makes metrics of a `transformers.EvalPrediction` at each evaluation: logits (`2n`, longest
            sequence, vocabulary) of the chosen, then of the rejected sequences, and their token ids. Only with it
            are evaluation's logits built, by a second, padded forward.
        callbacks: Further `transformers.TrainerCallback`s.
        optimizers: An optimizer and a scheduler of your own.
        quantization_config: How to quantize the weights of a model that is given by path or name.
        peft_config: Puts a fresh adapter on the model.
        optimizer_cls_and_kwargs: An optimizer's class and its keyword arguments, as `transformers.Trainer` takes them.
        preprocess_logits_for_metrics: What to keep of the logits, given them and the token ids.
        loss: Your own loss instead of `loss_type`: a function of `tether.PairScores` and `tether.LossOptions` that
            returns one value per pair. With `loss.needs_tokens = True` it also gets every token (`scores.tokens`).
        reference: A `tether.Reference`, or a function that is called with the policy, its adapter on it, and returns
            one: `lambda policy: SynchronizedReference(ExplicitReference.of_policy(policy), lambda: policy, every=64)`.
            It takes the place of `ref_model` and of all `ref_*` options.

    Raises:
        ConfigurationError: For options that contradict each other or the model.
        DataError: For a row that is not a preference pair.
        NotFiniteError: From `train` and `save_model`, when the loss or the weights have become NaN or infinite.

    Example:
        >>> trainer = DPOTrainer(model, args=DPOConfig(output_dir="out"), train_dataset=pairs,
        ...                      processing_class=tokenizer)   # doctest: +SKIP
        >>> trainer.train()                                    # doctest: +SKIP
    """

    _tag_names: ClassVar[list[str]] = ["tether", "dpo"]  # a subclass may add its own

    args: DPOConfig
    model: Any

    @with_known_names
    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: str | PreTrainedModel | PeftModel | None = None,
        args: DPOConfig | None = None,
        data_collator: Collator | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | Mapping[str, Rows] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        *,
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Any, Tensor], Any] | None = None,
        loss: PreferenceLoss | None = None,
        reference: Reference | Callable[[nn.Module], Reference] | None = None,
    ) -> None:
        data = data_collator, train_dataset, eval_dataset, processing_class
        metrics = compute_metrics, preprocess_logits_for_metrics
        run = callbacks, optimizers, optimizer_cls_and_kwargs, quantization_config, peft_config
        is_subclass = type(self) is not DPOTrainer
        asked = Asked(model, ref_model, args, *data, *metrics, *run, loss, reference, is_subclass)
        checked = check(asked)  # from here on the caller's models change; what can be refused has been
        for_transformers = self._begin(checked, asked)
        names = "push_to_hub", "hub_model_id", "report_to", "torch_compile_backend"
        asked_of_transformers = naming_options(self.args, *names)
        with full_evaluation(self.args) as self._evaluation_dtype, asked_of_transformers:
            super().__init__(
                **for_transformers,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            )
        self._begin_run(checked)

    def _begin(self, checked: Checked, asked: Asked) -> dict[str, Any]:
        """Prepares the policy and what a step needs besides it; what transformers' constructor is given."""
        prepared = prepare(checked, asked)
        self.args = checked.facts.args
        self._sets, self._tokenizer = checked.reader, checked.facts.tokenizer
        self._objective = checked.facts.objective
        self._router_coefficient = router_coefficient(checked.facts)
        self._activations = prepared.activations
        self._train_sums, self._eval_sums = MetricSums(), MetricSums()
        self._losses = LossWatch()
        self._num_train_tokens = 0
        self._epochs, self._place = EpochsOfBatches(), None
        self._folder = RunFolder(Path(str(self.args.output_dir)))
        return {
            "model": prepared.policy,
            "args": self.args,
            "data_collator": self._sets.collator,
            "train_dataset": checked.train_set,
            "eval_dataset": checked.eval_sets,
            "processing_class": checked.processing,
        }

    def _begin_run(self, checked: Checked) -> None:
        """Tries a save, and builds the reference beside the policy, which the accelerator holds by now."""
        if is_adapter_model(self.model) and self.args.recomputes_activations:
            self.model.enable_input_require_grads()
        with raising_together():
            if self.args.should_save:
                try_saving(self._save, self.model, str(self.args.output_dir))
        self._reference_run = self._run_of_reference(checked)
        self.add_callback(self._reference_run)
        self.add_callback(self._epochs)
        self.model.add_model_tags(list(self._tag_names))

    def _run_of_reference(self, checked: Checked) -> ReferenceRun:
        facts, shard = checked.facts, sharding_of(self.accelerator)
        if (shard is not None) != facts.is_sharded:  # the launcher knew more than the options
            refuse(refused_run(replace(facts, is_sharded=shard is not None)))
        cast_as_training_will(self.model, self.accelerator)
        around = replace(checked.around, shard=shard, autocast_dtype=autocast_dtype(self.accelerator))
        with raising_together():
            reference = build_reference(self.model, facts, around)
            if facts.reference is not None:
                refuse(refused_own(reference, facts))
        check_alike(reference.identity.digest, "reference")
        follow_average(reference, facts.leaders)
        run = ReferenceRun(
            reference,
            self.accelerator,
            self.args,
            lambda: self.data_collator,
            lambda: named_sets(self.train_dataset, self.eval_dataset),
            self.model,
            autocast_dtype=around.autocast_dtype,
            waits=shard is not None or waits_for_device(self.model, self.args.device),
        )
        with raising_together():
            if facts.reference is not None:
                check_own(reference, self.model, around.autocast_dtype)
        self._reference_name = source_name(checked, reference)
        if self.args.report_samples:
            self.add_callback(SampleReport(self, reference, around.autocast_dtype))
        return run

    # ---- the reference -------------------------------------------------------------------------------------------

    @property
    def reference(self) -> Reference:
        """The reference of this run; chosen at construction."""
        return self._reference_run.reference

    @reference.setter
    def reference(self, value: Any) -> NoReturn:
        raise AttributeError(
            "Cannot set `trainer.reference`: it is watched and saved from the start. Pass it at construction, "
            "`DPOTrainer(..., reference=...)`."
        )

    @property
    def ref_model(self) -> nn.Module | None:
        """The reference's own model, or None where it has none apart from the policy."""
        return self.reference.module

    @ref_model.setter
    def ref_model(self, value: Any) -> NoReturn:
        raise AttributeError(
            "Cannot set `trainer.ref_model`: the reference is watched and saved from the start. Pass it at "
            "construction, `DPOTrainer(..., ref_model=...)` or `DPOTrainer(..., reference=...)`."
        )

    def null_ref_context(self) -> AbstractContextManager[None]:
        """While open, the policy computes what the reference computes (adapter models)."""
        return self.reference.in_policy()

    # ---- a step --------------------------------------------------------------------------------------------------

    @property
    def loss_is_scaled_for_ga(self) -> bool:  # type: ignore[override]  # transformers has an attribute here
        """Whether `compute_loss` divides by the pairs of the whole optimizer step.

        A subclass's own, or one set on the instance, is taken for the mean of a micro-batch, as TRL takes it.
        """
        return getattr(self.compute_loss, "__func__", None) is _COMPUTE_LOSS

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self._activations:
            loss = super().training_step(*args, **kwargs)
        self._losses.see(loss, self.state.global_step + 1)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a micro-batch: its share of the mean over all pairs of the optimizer step.

        With `return_outputs`, also an output whose `logits` are those of the padded rows, chosen ones first, made by a
        second forward without gradient.

        The reference is asked before the policy, whose graph must see the policy's tensors (see ImplicitReference).
        """
        batch = batch_of(inputs)
        sums = self._train_sums if self.model.training else self._eval_sums
        reference = self.reference.log_probs(batch)
        if self.state.global_step == 0:
            is_compiled = hasattr(model, "_orig_mod")  # then it may compute otherwise
            as_it_trains = model if is_compiled else self.accelerator.unwrap_model(self.model)
            self._train_sums.add_once(self._reference_run.watch.gap_at_start(as_it_trains, batch, reference))
        with self._precision():
            policy = score(
                model,
                batch,
                statistics=True,
                auxiliary_loss=self._router_coefficient != 0,
                # NEFTune's noise is scaled by the length of a row, which has to be one sequence.
                layout="auto" if self.args.neftune_noise_alpha is None else "padded",
            )
        if batch.scored is not None:
            refuse(refused_holes(self.reference))
        policy = scored_tokens(batch, policy)
        scores, losses = self._objective(
            batch, policy, reference, training=self.model.training, reduce=self._sum_over_processes
        )
        if policy.auxiliary_loss is not None:
            losses = losses + self._router_coefficient * policy.auxiliary_loss
        metrics = pair_metrics(
            batch,
            scores,
            losses,
            self._objective.options_of(batch).beta,
            policy,
            self._reference_run.watch.noise_spread,
        )
        sums.add(metrics, batch.num_counted_pairs, self.state.global_step)
        if self.model.training:
            self._num_train_tokens += batch.num_sequence_tokens()
        if num_items_in_batch is None:
            loss = losses.mean() * batch.counts
        else:  # gradients are averaged over processes, and this is a sum over this process's pairs
            loss = losses.sum() * (self.accelerator.num_processes * batch.counts) / num_items_in_batch
        if not return_outputs:
            return loss
        with torch.no_grad(), self._precision():
            logits, _ = padded_logits(model, batch, self._pad_token_id)
        return loss, CausalLMOutput(logits=logits)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        means = {}
        if logs.keys() & {"loss", "train_loss"}:  # the second in the last entry: every process makes both
            self._losses.check()
            means = self._train_sums.means(self._sum_over_processes)
        if means:
            means.pop("loss", None)  # the trainer's own is the mean over the steps since the last log
            logs |= means | {"num_tokens": self._sum_tokens()}
            logs |= self.reference.figures() | self._reference_run.watch.distances(
                self.accelerator.unwrap_model(self.model)
            )
        super().log(logs, start_time)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        with naming_options(self.args, "optim", "optim_args", "optim_target_modules"):
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        option = "lr_scheduler_kwargs" if self.args.lr_scheduler_kwargs else "lr_scheduler_type"
        with naming_options(self.args, option):
            return super().create_scheduler(*args, **kwargs)

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the reference belongs to one policy."""
        _refuse_model_init("call `trainer.hyperparameter_search`")

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, "model_init", None) is not None:
            _refuse_model_init("train with `trainer.model_init`")
        if self.train_dataset is None:
            raise ConfigurationError(
                problem="Cannot train without `train_dataset`: this trainer was made to evaluate.",
                instead="Pass the pairs to train on: `DPOTrainer(..., train_dataset=pairs)`.",
            )
        self._losses = LossWatch()
        self._reference_run.watch.shared.keep_what_trains(self.optimizer)  # before a checkpoint is loaded into it
        try:
            with self._in_folder(resume_from_checkpoint) as checkpoint, without_token_notice():
                output = super().train(checkpoint, *args, **kwargs)
                self._check_weights()
                return output
        finally:
            restore_attention(self.accelerator.unwrap_model(self.model))


_COMPUTE_LOSS = DPOTrainer.compute_loss


def _refuse_model_init(what: str) -> NoReturn:
    raise ConfigurationError(
        problem=f"Cannot {what}: each trial has another policy, and the reference was made of the first.",
        instead="Build a new `DPOTrainer` for each trial; with `precompute_ref_log_probs=True` they share the "
        "reference's answers.",
    )
