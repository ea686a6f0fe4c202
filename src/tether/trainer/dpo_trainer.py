"""`DPOTrainer`: the training loop of transformers with a reference in it.

Orchestrates; decides nothing about references (`reference.build` does), losses or scoring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, Trainer, TrainerCallback, set_seed
from transformers.modeling_outputs import CausalLMOutput
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, PredictionOutput

from tether.config.dpo_config import DPOConfig, look_for_unused_parameters, objective_of
from tether.config.rules.arguments import refused_arguments, refused_data_parallel, refused_loading, refused_loss
from tether.config.rules.facts import Facts, will_shard
from tether.config.rules.run import adds_figures, refused_float16, refused_reference, refused_run, router_coefficient
from tether.data.collators import Collator
from tether.data.datasets import (
    PairDataset,
    Rows,
    as_dataset,
    batch_columns,
    batch_of,
    num_pairs_tensor,
    uncounted,
)
from tether.data.rows import has_image_column
from tether.data.sampling import EvenBatches
from tether.data.tokenizing import largest_id
from tether.distributed import autocast_dtype, cast_as_training_will, check_alike, sharding_of, together
from tether.errors import ArgumentTypeError, ConfigurationError
from tether.losses import PreferenceLoss
from tether.losses.metrics import MetricSums, pair_metrics
from tether.models.finite import LossWatch, check_weights
from tether.models.loading import default_output_dir, load, tokenizer_of, use_pad_token
from tether.models.offloading import activations_of
from tether.models.preparing import (
    add_adapter,
    broadcasts_buffers,
    check_embeds,
    disable_dropout,
    keep_differentiable,
)
from tether.reference import BemaReference, Reference
from tether.reference.identity import check_finite, model_tensors
from tether.reference.implicit import is_adapter_model
from tether.reference.watch import ReferenceWatch
from tether.refusals import refuse
from tether.scoring import restore_attention, score
from tether.trainer.batches import RowsToScore, counted_loader, even_loader
from tether.trainer.build_reference import Surroundings, build_reference, waits_for_device
from tether.trainer.callbacks import BEMACallback
from tether.trainer.checkpoint_weights import load_weights, save_adapters
from tether.trainer.checkpoints import (
    StreamPlace,
    load_companions,
    load_place,
    load_reference,
    load_reward_shift,
    load_start,
    save_reference,
    save_reward_shift,
    save_start,
    warn_of_no_sync,
    warn_of_weights_alone,
)
from tether.trainer.evaluation import (
    PairGather,
    WithTokenIds,
    full_evaluation,
    padded_logits,
    running_in,
)
from tether.trainer.model_card import write_model_card
from tether.trainer.reference_columns import digest_given
from tether.trainer.saving import keep_savable, try_saving
from tether.trainer.sets import SetReader, named_sets
from tether.trainer.trainable import checkpoints_activations, warn_of_optimizer
from tether.trainer.training_callback import FollowTraining
from tether.trainer.trl_attributes import OptionsAsAttributes

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

_SENTINEL_PAIRS = 2


class DPOTrainer(OptionsAsAttributes, Trainer):
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

    Args:
        model: The policy: a path or name, a `PreTrainedModel`, or a `PeftModel`.
        ref_model: The reference model, or a path to one; by default the policy as it is now.
        args: The options; by default `DPOConfig` with an output folder named after the model.
        data_collator: A collator of your own that returns the padded batches of `DataCollatorForPreference`. The
            default pads nothing and needs no padding token.
        train_dataset: Rows with `prompt`, `chosen`, `rejected` (text or messages), or without `prompt`; for a model
            that reads them with `image` or `images`.
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
        loss: A loss of your own instead of `loss_type`: a function of `tether.PairScores` and `tether.LossOptions`
            that gives one value per pair.

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

    reference: Reference
    args: DPOConfig
    model: Any
    _signature_columns: Any

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
    ) -> None:
        refuse(refused_arguments(args, model, ref_model, callbacks, peft_config, processing_class), ArgumentTypeError)
        args = args or DPOConfig(default_output_dir(model))
        loading = refused_loading(args, model, processing_class, quantization_config)
        refuse((*refused_data_parallel(args), *refused_loss(args, loss), *loading))
        set_seed(args.seed)  # a fresh adapter starts from it
        policy, ref_model, processing, origins = load(
            model,
            ref_model,
            processing_class,
            init_kwargs=args.model_init_kwargs,
            quantization_config=quantization_config,
            trust_remote_code=args.trust_remote_code,
        )
        self._tokenizer: PreTrainedTokenizerBase = tokenizer_of(processing)
        self._objective = objective_of(args, loss)
        self._sets = SetReader(processing, args, data_collator)
        train_rows, eval_rows = as_dataset(train_dataset), self._sets.as_datasets(eval_dataset)
        leaders = [c for c in callbacks or () if isinstance(c, BEMACallback) and c.update_ref_model]
        facts = Facts(
            args=args,
            policy=policy,
            ref_model=ref_model,
            new_adapter=peft_config,
            optimizer=optimizers[0],
            tokenizer=self._tokenizer,
            sets=named_sets(train_rows, eval_rows),
            truncation=self._sets.truncation,
            objective=self._objective,
            has_own_figures=(compute_metrics is not None and not args.prediction_loss_only)
            or type(self) is not DPOTrainer
            or any(map(adds_figures, callbacks or ())),
            follows_average=bool(leaders),
            is_sharded=will_shard(args),
        )
        for loaded in filter(None, (policy, ref_model)):
            keep_differentiable(loaded)  # first, because a rule may make a forward
        refuse(refused_run(facts))
        if ref_model is not None:
            check_finite(model_tensors(policy))  # a reference made from the policy looks at its weights itself
        use_pad_token(self._tokenizer, args.pad_token)
        train_set, eval_sets = self._sets.read(train_rows, "train"), self._sets.read_all(eval_rows)
        sets = named_sets(train_set, eval_sets)
        self._check_ids(sets, policy)
        around = Surroundings(
            origins=origins,
            decode=lambda ids: str(self._tokenizer.decode(list(ids))),
            given=digest_given(sets) if facts.brings_log_probs else None,
        )
        # From here on the caller's models change; what can be refused has been.
        self._router_coefficient = router_coefficient(facts)
        warn_of_optimizer(facts)
        for loaded in filter(None, (policy, ref_model)):
            keep_savable(loaded)
        args.ddp_broadcast_buffers = broadcasts_buffers(
            policy, self._sets.truncation.max_length, args.ddp_broadcast_buffers
        )
        policy = add_adapter(policy, peft_config)
        if args.deepspeed_plugin is None:  # an adapter's copy of a module (`modules_to_save`) has the base's dtype
            refuse(refused_float16(policy))
        args.activation_checkpointing = checkpoints_activations(policy, args.activation_checkpointing)
        if args.disable_dropout:
            disable_dropout(policy)
        self._activations = activations_of(policy, offloaded=args.activation_offloading)
        self._train_sums, self._eval_sums = MetricSums(), MetricSums()
        self._losses = LossWatch()
        self._num_train_tokens = 0
        self._even_batches: EvenBatches | None = None
        self._place: StreamPlace | None = None
        collator: Any = self._sets.collator
        if compute_metrics is not None and "inputs" in args.include_for_metrics:
            collator = WithTokenIds(collator, self._pad_token_id)
        if self._sets.image_rows is not None:
            look_for_unused_parameters(args)
        # A batch is one object; it cannot be cut into slices.
        args.accelerator_config.dispatch_batches = False  # type: ignore[union-attr]
        with full_evaluation(args) as self._evaluation_dtype:
            super().__init__(
                model=policy,
                args=args,
                data_collator=collator,
                train_dataset=train_set,
                eval_dataset=eval_sets,
                processing_class=processing,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            )
        if is_adapter_model(self.model) and args.activation_checkpointing:
            self.model.enable_input_require_grads()
        with together():
            if args.should_save:
                try_saving(self._save, self.model, str(args.output_dir))
        self._make_reference(facts, around, leaders)
        self.model.add_model_tags(list(self._tag_names))

    # ---- the reference -------------------------------------------------------------------------------------------

    @property
    def ref_model(self) -> nn.Module | None:
        """The reference's own model, or None where it has none apart from the policy."""
        return self.reference.module

    def null_ref_context(self) -> AbstractContextManager[None]:
        """While open, the policy computes what the reference computes (adapter models)."""
        return self.reference.in_policy()

    def _make_reference(self, facts: Facts, around: Surroundings, leaders: Sequence[BEMACallback]) -> None:
        """Builds the reference beside the policy, which the accelerator holds by now, and watches it from here on."""
        shard = sharding_of(self.accelerator)
        if (shard is not None) != facts.is_sharded:  # the launcher knew more than the options
            refuse(refused_reference(replace(facts, is_sharded=shard is not None)))
        cast_as_training_will(self.model, self.accelerator)
        with together():
            around = replace(around, shard=shard, autocast_dtype=autocast_dtype(self.accelerator))
            self.reference = build_reference(self.model, facts, around)
        check_alike(self.reference.identity.digest, "reference")
        for leader in leaders:
            assert isinstance(self.reference, BemaReference)
            leader.follow_with(self.reference)
        self._watch = ReferenceWatch(self.reference, around.autocast_dtype)
        # A pass through the policy's own modules must wait until training has sharded them and put them in place.
        is_early = shard is not None or waits_for_device(self.model, self.args.device)
        self._prepares_late = is_early and self.reference.runs_in_policy
        if not self._prepares_late:
            self._prepare_reference(named_sets(self.train_dataset, self.eval_dataset))
        if self.reference.moves:
            warn_of_weights_alone(self.args)
        self.add_callback(FollowTraining(self.reference, self._watch, self._begin_training, self._begin_epoch))

    def export_reference(self, folder: str | Path, *, merged: bool = False) -> None:
        """Saves the reference as it is now, with the tokenizer, to be loaded as any other model or adapter.

        A full model loads with `AutoModelForCausalLM.from_pretrained(folder)`, an adapter with
        `PeftModel.from_pretrained(base, folder)`, whose ranks may be larger than the policy's. Every process must
        call it, because sharded weights are gathered; one writes.

        Args:
            folder: Where to.
            merged: Save an adapter's reference as a full model, with the adapter in its weights.

        Raises:
            ReferenceModelError: If the reference has no weights of its own, or cannot be saved in that form.
        """
        writes = self.args.should_save
        self.reference.export(Path(folder) if writes else None, merged=merged)
        if writes:
            assert self.processing_class is not None
            self.processing_class.save_pretrained(folder)

    def _watch_from_start(self, *, has_trained: bool) -> None:
        """Keeps what reference and policy say of a few fixed pairs; a resumed policy is not the initial one."""
        pairs: Any = self.train_dataset
        # Where answers are stored, each process watches pairs of its own share: none is scored by two. Elsewhere all
        # watch the same, which a resumed run finds again in the checkpoint that one of them wrote.
        share = self.args.process_index if self.reference.answers_are_stored else 0
        own = share * self.args.per_device_train_batch_size
        rows = list(pairs.skip(own).take(_SENTINEL_PAIRS)) if own else []
        rows = rows or list(pairs.take(_SENTINEL_PAIRS))
        self._watch.set_sentinel(batch_of(self.data_collator(rows)).to(self.args.device))
        self.accelerator.wait_for_everyone()  # so that a store filled on the way has them before anybody asks again
        if not has_trained:
            self._watch.set_start(self.accelerator.unwrap_model(self.model))

    def _begin_training(self, state: TrainerState) -> None:
        keep_savable(self.model)  # by now it has the tokenizer's special tokens
        if self._prepares_late:
            self._prepares_late = False
            self._prepare_reference(named_sets(self.train_dataset, self.eval_dataset))
        self._watch_from_start(has_trained=state.global_step > 0)
        warn_of_no_sync(self.args, state.max_steps)

    def _begin_epoch(self, epoch: int) -> None:
        if self._even_batches is not None:
            self._even_batches.set_epoch(epoch)

    def _prepare_reference(self, sets: Mapping[str, PairDataset]) -> None:
        batches = {
            name: lambda dataset=dataset: RowsToScore(dataset, self.data_collator, self.args)
            for name, dataset in sets.items()
            if isinstance(dataset, Dataset)
        }
        show_progress = not self.args.disable_tqdm and self.is_local_process_zero()
        # A row that one process cannot use stops them all; where scoring is collective they are in step already.
        with nullcontext() if self.reference.is_collective else together():
            self.reference.prepare(batches, show_progress=show_progress)
        self.accelerator.wait_for_everyone()

    # ---- data ----------------------------------------------------------------------------------------------------

    @property
    def _pad_token_id(self) -> int:
        return int(self._tokenizer.pad_token_id or 0)

    @staticmethod
    def _check_ids(sets: Mapping[str, PairDataset], policy: Any) -> None:
        for name, dataset in sets.items():
            # Tokens of images are placeholders: a model may embed none of them.
            if isinstance(dataset, Dataset) and not has_image_column(dataset.column_names):
                largest, row = largest_id(dataset)
                check_embeds(policy, largest, f"Row {row} of the {name} set")

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The training batches; grouped by length and cut to the token budget where that is asked for."""
        wanted = self.args.max_tokens_per_micro_batch or self.args.train_sampling_strategy == "group_by_length"
        if not isinstance(self.train_dataset, Dataset) or not wanted:
            return super().get_train_dataloader()
        loader, self._even_batches = even_loader(
            self.train_dataset, self.data_collator, self._train_batch_size, self.args, self.accelerator
        )
        return loader

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Any = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> DataLoader[Any]:
        if isinstance(dataset, Dataset):
            dataset = self._remove_unused_columns(dataset, description=description)
        make = super()._get_dataloader
        # Evaluation takes rows as they come; transformers would group them by `input_ids`, which they do not have.
        order = (lambda _: sampler_fn(dataset)) if is_training and sampler_fn else None
        return counted_loader(
            lambda rows: make(rows, description, batch_size, order, is_training, dataloader_key),
            dataset,
            batch_size,
            self.accelerator,
            drop_last=bool(self.args.dataloader_drop_last),
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of an optimizer step, and the number of their pairs.

        A pass over a stream may end before there are as many as were asked for. transformers would then add their
        gradient to that of the next step: batches that do not count let it take a step of what there is.
        """
        batches, num_pairs = super().get_batch_samples(epoch_iterator, num_batches, device)
        missing = num_batches - len(batches)
        if batches and self._place is not None:
            self._place.take_step(ends_pass=missing > 0 or self.accelerator.gradient_state.end_of_dataloader)
            batches += [uncounted(batches[-1])] * missing
        return batches, num_pairs

    def _init_training_state(
        self, max_steps: int, num_steps: int, num_epochs: int, checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        """Epochs that are over, and batches of the next one that are."""
        epochs, batches = super()._init_training_state(max_steps, num_steps, num_epochs, checkpoint, trial)
        if isinstance(self.train_dataset, IterableDataset):
            self._place = StreamPlace() if checkpoint is None else load_place(Path(checkpoint))
            if self.args.ignore_data_skip:
                self._place.num_steps = 0
            epochs, batches = self._place.num_passes, self._place.num_steps * self.args.gradient_accumulation_steps
        # A run that has taken all its steps has none left, in whatever epoch it ended.
        return (num_epochs, 0) if self.state.global_step >= max_steps else (epochs, batches)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = batch_columns(with_images=self._sets.image_rows is not None)

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
        unwrapped, has_trained = self.accelerator.unwrap_model(self.model), self.state.global_step > 0
        gap = self._watch.gap_at_start(unwrapped, batch, reference, has_trained=has_trained)
        self._train_sums.add_once(gap)
        with self._precision():
            policy = score(
                model,
                batch,
                statistics=True,
                auxiliary_loss=self._router_coefficient != 0,
                # NEFTune's noise is scaled by the length of a row, which has to be one sequence.
                layout="auto" if self.args.neftune_noise_alpha is None else "padded",
            )
        scores, losses = self._objective(
            batch, policy, reference, training=self.model.training, reduce=self._sum_over_processes
        )
        if policy.auxiliary_loss is not None:
            losses = losses + self._router_coefficient * policy.auxiliary_loss
        sums.add(
            pair_metrics(batch, scores, losses, self.args.beta, policy), batch.num_counted_pairs, self.state.global_step
        )
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

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor | None:
        """Pairs of the whole optimizer step: all micro-batches of all processes. None where means are taken of each."""
        if not batch_samples or not self.loss_is_scaled_for_ga:
            return None
        counts = [num_pairs_tensor(inputs).to(device) for inputs in batch_samples]
        total: Tensor = self.accelerator.reduce(torch.stack(counts).sum(), reduction="sum")
        return total

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Counts each response with its prompt, as a batch without padding has them."""
        tokens = torch.ones(batch_of(inputs).num_sequence_tokens())
        name = getattr(self.model, "main_input_name", "input_ids")
        super()._track_num_input_tokens({name: tokens, "attention_mask": tokens})

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
            loss = self.compute_loss(model, inputs)
            if prediction_loss_only:
                return loss.detach(), None, None
            with self._precision():
                return loss.detach(), *padded_logits(model, batch, self._pad_token_id)

    def _precision(self) -> AbstractContextManager[Any]:
        """Of the policy's forward alone: the reference answers as it does in training."""
        return running_in(None if self.model.training else self._evaluation_dtype, self.args.device)

    # ---- reports -------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        means = {}
        if logs.keys() & {"loss", "train_loss"}:  # the second in the last entry: every process makes both
            self._losses.check()
            means = self._train_sums.means(self._sum_over_processes)
        if means:
            means.pop("loss", None)  # the trainer's own is the mean over the steps since the last log
            logs |= means | {"num_tokens": self._sum_tokens()}
            logs |= self.reference.figures() | self._watch.distances(self.accelerator.unwrap_model(self.model))
        super().log(logs, start_time)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, "model_init", None) is not None:
            raise ConfigurationError(
                problem="Cannot train with `trainer.model_init`, as `hyperparameter_search` does: it makes another "
                "policy for each run, and the reference was made of the first.",
                instead="Build a new `DPOTrainer` for each trial; with `precompute_ref_log_probs=True` they share the "
                "reference's answers.",
            )
        self._losses = LossWatch()
        try:
            output = super().train(*args, **kwargs)
            self._check_weights()
            return output
        finally:
            restore_attention(self.accelerator.unwrap_model(self.model))

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
            self._check_ids(named_sets(None, tokenized), self.accelerator.unwrap_model(self.model))
        if tokenized is not self.eval_dataset and not self._prepares_late:
            self._prepare_reference(named_sets(None, tokenized))
        return tokenized

    def _sum_over_processes(self, totals: Tensor) -> Tensor:
        reduced: Tensor = self.accelerator.reduce(totals, reduction="sum")
        return reduced

    def _sum_tokens(self) -> float:
        return self._sum_over_processes(torch.tensor(float(self._num_train_tokens), device=self.args.device)).item()

    # ---- model card ----------------------------------------------------------------------------------------------

    def create_model_card(  # type: ignore[override]  # TRL's arguments, which its scripts pass by position
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Writes `output_dir/README.md`: the loss, the reference and the options of this run, and what to cite.

        Args:
            model_name: The model's name; by default the output folder's.
            dataset_name: The data's name on the hub.
            tags: Further tags.
        """
        if self.is_world_process_zero():
            write_model_card(self, Path(str(self.args.output_dir)), model_name, dataset_name, tags)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the policy with its tokenizer and its card; weights that are NaN or infinite are refused."""
        self._check_weights()
        super().save_model(output_dir, _internal_call)
        # A checkpoint; DeepSpeed's own files of one have every tensor under its name.
        if _internal_call and output_dir is not None and not self.is_deepspeed_enabled:
            save_adapters(self.accelerator.unwrap_model(self.model), Path(output_dir), writes=self.args.should_save)
        if _internal_call or output_dir in (None, self.args.output_dir):  # all checkpoints share one card
            self.create_model_card()
        elif self.is_world_process_zero():
            write_model_card(self, Path(output_dir))

    def _check_weights(self) -> None:
        check_weights(self.accelerator.unwrap_model(self.model), "keep the policy", self.state.global_step)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._losses.check()
        self._check_weights()  # before anything is written
        super()._save_checkpoint(model, trial)

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        num_tokens = self._sum_tokens()  # every process takes part
        save_reference(Path(output_dir), self.reference, num_tokens, place=self._place, writes=self.args.should_save)
        if self.args.should_save:
            save_reward_shift(Path(output_dir), self._objective.reward_shift)
            save_start(Path(output_dir), self._watch.start)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not load_weights(self.accelerator.unwrap_model(self.model), Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        checkpoint = Path(str(self.state.best_model_checkpoint))
        self.accelerator.wait_for_everyone()  # one process may still be writing it
        if self.is_deepspeed_enabled or not load_weights(self.accelerator.unwrap_model(self.model), checkpoint):
            super()._load_best_model()
        load_companions(checkpoint, self.reference, self._objective.reward_shift)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            num_tokens = load_reference(Path(checkpoint), self.reference)
            self._num_train_tokens = num_tokens if self.args.process_index == 0 else 0
            load_reward_shift(Path(checkpoint), self._objective.reward_shift)
            self._watch.start = load_start(Path(checkpoint))
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, BEMACallback):
                    callback.resume_from(Path(checkpoint))


_COMPUTE_LOSS = DPOTrainer.compute_loss
