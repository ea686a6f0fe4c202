"""What happens before transformers' own constructor: models are loaded, the run is checked, its sets are read.

Everything that can be refused is refused in `check`; only `prepare` changes what is the caller's.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin, set_seed

from tether.config.dpo_config import DPOConfig, look_for_unused_parameters, objective_of
from tether.config.rules.arguments import (
    refused_arguments,
    refused_data_parallel,
    refused_door,
    refused_gguf,
    refused_loading,
    refused_loss,
)
from tether.config.rules.facts import Facts, will_shard
from tether.config.rules.model import refused_float16
from tether.config.rules.options import refused_options
from tether.config.rules.run import adds_figures, refused_run
from tether.data.datasets import MARGIN_COLUMN, PairDataset, Rows, as_dataset
from tether.errors import ArgumentTypeError, TetherError, said
from tether.losses import PreferenceLoss
from tether.models.gguf import use_as_plain
from tether.models.loading import Loaded, default_output_dir, load, tokenizer_of, use_pad_token
from tether.models.offloading import activations_of
from tether.models.preparing import (
    add_adapter,
    broadcasts_buffers,
    disable_dropout,
    keep_differentiable,
    position_limit,
)
from tether.reference.identity import check_finite, model_tensors
from tether.refusals import of_option, refuse
from tether.trainer.build_reference import Surroundings
from tether.trainer.callbacks import BEMACallback
from tether.trainer.reference_columns import digest_given
from tether.trainer.saving import keep_savable
from tether.trainer.sets import EvalSets, SetReader, check_ids, named_sets
from tether.trainer.trainable import checkpoints_activations, warn_of_optimizer
from tether.trainer.versions import note_untested

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """The arguments of `DPOTrainer` that a run is made of, as they were given, and whether a subclass was asked."""

    model: Any
    ref_model: Any
    args: DPOConfig | None
    data_collator: Any
    train_dataset: Rows | None
    eval_dataset: Rows | Mapping[str, Rows] | None
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None
    compute_metrics: Any
    preprocess_logits_for_metrics: Any
    callbacks: Any
    optimizers: Any
    optimizer_cls_and_kwargs: Any
    quantization_config: Any
    peft_config: Any
    loss: PreferenceLoss | None
    reference: Any
    is_subclass: bool


@dataclass(frozen=True)
class Checked:
    """A run that nothing is wrong with, before anything is changed.

    Attributes:
        facts: What it is asked to do.
        around: What its reference needs to know that no option says.
        reader: What reads its sets.
        processing: The tokenizer, or the processor of a vision-language model.
        train_set, eval_sets: The tokenized sets; a run that only evaluates has none to train on.
    """

    facts: Facts
    around: Surroundings
    reader: SetReader
    processing: PreTrainedTokenizerBase | ProcessorMixin
    train_set: PairDataset | None
    eval_sets: EvalSets


def check(asked: Asked) -> Checked:
    """Loads what is named, and refuses everything that cannot be, before anything of the caller's is changed.

    Raises:
        ArgumentTypeError: For arguments of another kind; all of them.
        ConfigurationError: For what does not go together; all of it.
        DataError: For rows that are not preference pairs.
    """
    if asked.train_dataset is None and asked.eval_dataset is None:
        raise ArgumentTypeError(
            problem="Cannot train without pairs: `train_dataset` is required, and it is None.",
            instead="Pass rows with `prompt`, `chosen` and `rejected`, or `eval_dataset` alone to evaluate.",
        )
    args = _checked_options(asked)
    set_seed(args.seed)  # a fresh adapter starts from it
    loaded = load(
        asked.model,
        asked.ref_model,
        asked.processing_class,
        init_kwargs=args.model_init_kwargs,
        quantization_config=asked.quantization_config,
        trust_remote_code=args.trust_remote_code,
    )
    limits = [position_limit(model) for model in (loaded.policy, loaded.ref_model) if model is not None]
    max_positions = min((limit for limit in limits if limit is not None), default=None)
    reader = SetReader(loaded.processing_class, args, asked.data_collator, max_positions)
    train_rows = None if asked.train_dataset is None else as_dataset(asked.train_dataset, "`train_dataset`")
    eval_rows = reader.as_datasets(asked.eval_dataset)
    facts = _facts(asked, args, loaded, reader, named_sets(train_rows, eval_rows))
    keep_differentiable(facts.policy)  # first, because a rule may make a forward
    if facts.ref_model is not None:
        keep_differentiable(facts.ref_model)
    refuse(refused_run(facts))
    if any(MARGIN_COLUMN in names for names in facts.columns.values()) and args.process_index == 0:
        logger.warning("Each row's `margin` is subtracted from its reward margin in the loss; drop the column if not.")
    if facts.ref_model is not None:
        check_finite(model_tensors(facts.policy))  # a reference made from the policy looks at its weights itself
    train_set = None if train_rows is None else reader.read(train_rows, "train")
    eval_sets = reader.read_all(eval_rows)
    sets = named_sets(train_set, eval_sets)
    check_ids(sets, facts.policy)
    tokenizer = facts.tokenizer  # the facts hold the models, which this must not keep alive
    around = Surroundings(
        origins=loaded.origins,
        decode=lambda ids: str(tokenizer.decode(list(ids))),
        given=digest_given(sets, reader.collator) if facts.brings_log_probs else None,
    )
    return Checked(facts, around, reader, loaded.processing_class, train_set, eval_sets)


def _checked_options(asked: Asked) -> DPOConfig:
    kinds = {
        name: getattr(asked, name) for name in inspect.signature(refused_arguments).parameters if name != "functions"
    }
    functions = {name: getattr(asked, name) for name in ("compute_metrics", "preprocess_logits_for_metrics", "loss")}
    refuse(refused_arguments(**kinds, **functions), ArgumentTypeError)
    args = asked.args or DPOConfig(default_output_dir(asked.model))
    refuse(
        (
            *refused_options(args),  # which may have changed since they were made
            *refused_data_parallel(args),
            *refused_loss(args, asked.loss),
            *refused_door(args, asked.reference, asked.ref_model),
            *refused_loading(args, asked.model, asked.processing_class, asked.quantization_config),
            *refused_gguf(args, asked.model, asked.ref_model, asked.quantization_config),
        )
    )
    return args


def _facts(asked: Asked, args: DPOConfig, loaded: Loaded, reader: SetReader, sets: Mapping[str, PairDataset]) -> Facts:
    callbacks = asked.callbacks or ()
    return Facts(
        args=args,
        policy=loaded.policy,
        ref_model=loaded.ref_model,
        reference=asked.reference,
        new_adapter=asked.peft_config,
        optimizer=asked.optimizers[0],
        tokenizer=tokenizer_of(loaded.processing_class),
        sets=sets,
        truncation=reader.truncation,
        objective=objective_of(args, asked.loss),
        has_own_figures=(asked.compute_metrics is not None and not args.prediction_loss_only)
        or asked.is_subclass
        or any(map(adds_figures, callbacks)),
        leaders=[c for c in callbacks if isinstance(c, BEMACallback) and c.update_ref_model],
        is_sharded=will_shard(args),
    )


@contextmanager
def naming_options(args: DPOConfig, *options: str) -> Iterator[None]:
    """While open, an error of a library becomes one that names those of these options that were set.

    Raises:
        ConfigurationError: With what the library said.
    """
    try:
        yield
    except TetherError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and str(args.output_dir) in str(error):
            why = f"it cannot be written ({error.strerror})"
            instead = "Name a folder that is new, or yours to write to."
            refuse([of_option("output_dir", args.output_dir, why, instead)], cause=error)
        defaults = {entry.name: entry.default for entry in fields(args)}
        values = {
            name: getattr(args, name) for name in options if getattr(args, name) not in (None, [], defaults[name])
        }
        why = f"{type(error).__name__}: {said(error)}"
        found = [of_option(name, value, why, f"Correct `{name}`, or leave it out.") for name, value in values.items()]
        refuse(found, cause=error)
        raise


@dataclass(frozen=True)
class Prepared:
    """A policy that is ready to train.

    Attributes:
        policy: With its adapter.
        activations: What a training step is run in.
    """

    policy: Any
    activations: AbstractContextManager[None]


def prepare(checked: Checked, asked: Asked) -> Prepared:
    """Changes what training needs changed: the padding token, the models, and the options that follow from them."""
    facts, args = checked.facts, checked.facts.args
    use_pad_token(facts.tokenizer, args.pad_token)
    warn_of_optimizer(facts)
    note_untested()
    for model in (facts.policy, facts.ref_model):
        if model is not None:
            use_as_plain(model)
            keep_savable(model)
    args.ddp_broadcast_buffers = broadcasts_buffers(
        facts.policy, checked.reader.truncation.max_length, args.ddp_broadcast_buffers
    )
    policy = add_adapter(facts.policy, asked.peft_config)
    if args.deepspeed_plugin is None:  # an adapter's copy of a module (`modules_to_save`) has the base's dtype
        refuse(refused_float16(policy))
    args.recomputes_activations = checkpoints_activations(policy, args.recomputes_activations)
    if args.disable_dropout:
        disable_dropout(policy)
    if asked.compute_metrics is not None and "inputs" in args.include_for_metrics:
        checked.reader.add_token_ids(int(facts.tokenizer.pad_token_id or 0))
    if checked.reader.image_rows is not None:
        look_for_unused_parameters(args)
    loading: Any = args.accelerator_config
    loading.dispatch_batches = False  # a batch is one object; it cannot be cut into slices
    # No step waits for its batch. MPS would read memory that is free again.
    loading.non_blocking |= args.dataloader_pin_memory and args.device.type != "mps"
    return Prepared(policy, activations_of(policy, offloaded=args.activation_offloading))
