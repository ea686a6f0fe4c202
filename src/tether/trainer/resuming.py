"""What a run says of itself in its checkpoints, and whether a trainer goes on with that run.

Knows options, data and adapters; knows no weights and no file but the manifest's.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from torch import nn
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from xxhash import xxh3_64

from tether.config.dpo_config import DPOConfig
from tether.config.rules.options import OBJECTIVE, ROW_ORDER
from tether.data.datasets import MARGIN_COLUMN, TOKEN_COLUMNS, PairDataset
from tether.data.tokenizing import arrow_tables
from tether.errors import ConfigurationError, ResumeError, TetherError, said
from tether.trainer.manifest import MANIFEST
from tether.trainer.run_folder import last_checkpoint, passed_over, whole_checkpoints

logger = logging.getLogger(__name__)

# What the optimizer and its schedule keep in the checkpoint, and go on with.
_KEPT = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
_LISTED = (
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "max_grad_norm",
    "num_train_epochs",
    "max_steps",
    "disable_dropout",
    "neftune_noise_alpha",
    "ignore_data_skip",
)
# The optimizer's state is of one of these, or of another optimizer.
_ALIKE = ("adamw_torch", "adamw_torch_fused")
# Of an adapter's configuration: where it came from, and what it was like before it trained, which the identity has.
_NOT_COMPARED = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "init_lora_weights",
    "peft_version",
    "revision",
    "task_type",
}


@dataclass(frozen=True)
class AboutRun:
    """What a run says of itself, as JSON has it.

    Attributes:
        objective: What it minimises, and the average that it keeps: what `CHANGES_OF_RESUME` names of it.
        training: Other options of which results depend.
        adapters: The configuration of each adapter, by name.
        data: Rows and digest of each set, the training set first; without numbers for a stream.
    """

    objective: dict[str, Any]
    training: dict[str, Any]
    adapters: dict[str, Any]
    data: dict[str, Any]

    @classmethod
    def of(cls, args: DPOConfig, policy: nn.Module, sets: Mapping[str, PairDataset], **objective: Any) -> AboutRun:
        """Of a run as it begins: a callback may change options later.

        Args:
            args: The options.
            policy: The policy.
            sets: The tokenized sets by name.
            objective: What of the objective the options do not say.
        """
        about = cls(
            {name: getattr(args, name) for name in OBJECTIVE} | objective,
            {name: getattr(args, name, None) for name in (*_KEPT, *_LISTED, *ROW_ORDER, "optim")},
            {name: _adapter(config) for name, config in getattr(policy, "peft_config", {}).items()},
            {name: _digest(dataset, args.pair_columns.names) for name, dataset in sets.items()},
        )
        return cls(**json.loads(json.dumps(asdict(about), default=_plain)))


def check_same_adapters(checkpoint: Path, about: Mapping[str, Any], own: AboutRun) -> None:
    """Compares the adapters: a checkpoint's weights are of no other.

    Raises:
        ResumeError: Names what differs.
    """
    if found := list(_differing_adapters(AboutRun(**about).adapters, own.adapters)):
        raise ResumeError(
            problem=f"Cannot resume from {checkpoint} with other adapters than its run had: {found[0]}.",
            details=" ".join(f"{text[0].upper()}{text[1:]}." for text in found[1:]),
            instead="Build the policy as that run did (`peft_config`, or the same adapter), or start a new run.",
        )


def check_same_run(checkpoint: Path, about: Mapping[str, Any], own: AboutRun, allowed: list[str]) -> None:
    """Compares the run of a checkpoint with the one that is to go on from it, and logs what else differs.

    Args:
        checkpoint: The folder.
        about: What its run said of itself.
        own: What this run says of itself.
        allowed: What may differ, `resume_changes`.

    Raises:
        ResumeError: If the optimizer differs, or what changes the objective, the training set or its order.
    """
    saved = AboutRun(**about)
    _check_same_optimizer(checkpoint, saved.training.get("optim"), own.training["optim"])
    differing = {
        name: _was(name, there, here)
        for name, (there, here) in _pairs(saved.objective, own.objective).items()
        if there != here
    }
    if (there := saved.data.get("train")) != (here := own.data.get("train")):
        differing["data"] = _other_rows(there, here)
    differing |= _other_order(saved.training, own.training)
    refused = {name: text for name, text in differing.items() if name not in allowed}
    if refused:
        names = sorted({*refused, *allowed})
        raise ResumeError(
            problem=f"Cannot resume from {checkpoint} as another run: {next(iter(refused.values()))}.",
            details=" ".join(f"{text[0].upper()}{text[1:]}." for text in list(refused.values())[1:]),
            instead=f"Use that run's {', '.join(refused)}, or start a new run. If the change is meant: "
            f"`resume_changes={names}` (`--resume_changes {' '.join(names)}`).",
        )
    _list_others(checkpoint, saved, own, differing)


def named_checkpoint(output_dir: Path, name: Any) -> Path:
    """The checkpoint that is named; by True, the last one of the run last started in the folder.

    Raises:
        ResumeError: If there is none; names those of earlier runs, or those in the folder that is named.
    """
    found = last_checkpoint(output_dir) if name is True else str(name)
    broken = [f"{n} is passed over: {why}." for n, why in passed_over(output_dir, found).items()] * (name is True)
    if found is not None and os.path.isdir(found):  # unlike Path's, for a name of any length
        if broken:
            logger.warning(f"Resuming from {found}. {' '.join(broken)}")
        elif name is not True:
            _refuse_run(Path(found))
        return Path(found)
    if name is not True:
        what = "it is a file, not a folder" if os.path.isfile(str(found)) else "there is no such folder"
        raise ResumeError(
            problem=f"Cannot resume from {found or repr(found)}: {what}.",
            details=f"Paths start at the current folder, {Path.cwd()}.",
            instead="Name the folder of a checkpoint (out/checkpoint-100), or start a new run.",
        )
    earlier: list[Any] = [*whole_checkpoints(output_dir)]
    unproven = [path for path in sorted(output_dir.glob("checkpoint-*")) if not (path / MANIFEST).exists()]
    why, details = "there is none", " ".join(broken)
    if earlier:
        why = "the run that was last started there has written none yet"
        details = f"{earlier[-1]} is of an earlier run."
    other = (earlier or unproven or ["the folder of a checkpoint"])[-1]
    raise ResumeError(
        problem=f"Cannot resume from the last checkpoint in {output_dir}: {why}.",
        details=details,
        instead=f"Name {other} to go on with it, or start a new run.",
    )


def _refuse_run(folder: Path) -> None:
    """Refuses the output folder of a run in place of one of its checkpoints."""
    last = None if (folder / MANIFEST).exists() else last_checkpoint(folder)
    if last is not None:
        raise ResumeError(
            problem=f"Cannot resume from {folder}: it is the folder of a run; its last checkpoint is {last}.",
            instead=f"Name {last}.",
        )


def check_unproven(checkpoint: Path, allowed: list[str], args: DPOConfig) -> None:
    """Refuses a checkpoint without a manifest, unless it is allowed and has what makes a run go on.

    Raises:
        ResumeError: Names what is missing.
    """
    if "manifest" not in allowed:
        raise ResumeError(
            problem=f"Cannot resume from {checkpoint}: it has no {MANIFEST}, so nothing shows that it is whole and of "
            "this run.",
            details="It was not written to its end, or by another library (TRL) or an older version of Tether.",
            instead="Resume from another checkpoint, or start a new run. If you know it to be right: "
            "`resume_changes=['manifest']` (`--resume_changes manifest`).",
        )
    rng = "rng_state.pth" if args.world_size == 1 else f"rng_state_{args.process_index}.pth"
    needed = [TRAINER_STATE_NAME, rng] + ["optimizer.pt", "scheduler.pt"] * (not args.deepspeed and not args.fsdp)
    missing = [name for name in needed if not (checkpoint / name).is_file()]
    if not missing:
        with reading(str(checkpoint)):
            TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    else:
        raise ResumeError(
            problem=f"Cannot resume from {checkpoint}: `{missing[0]}` is missing.",
            details=f"So are {', '.join(missing[1:])}." if missing[1:] else "",
            instead="Resume from another checkpoint, or start a new run.",
        )


def check_optimizer(optimizer: Any) -> None:
    """Refuses the state of another kind of optimizer, whose options it is loaded without.

    Raises:
        KeyError: Names them.
    """
    groups = getattr(optimizer, "param_groups", [])
    missing = sorted({name for group in groups for name in getattr(optimizer, "defaults", {}) if name not in group})
    if missing:
        raise KeyError(f"the optimizer's state has no {', '.join(missing)}")


def refuse_changes(allowed: list[str]) -> None:
    """Refuses `resume_changes` where nothing is resumed.

    Raises:
        ConfigurationError: Always.
    """
    raise ConfigurationError(
        problem=f"Cannot use `resume_changes={allowed}` in a run that resumes nothing: it has nothing to allow.",
        instead="Leave it out, or resume a checkpoint.",
    )


@contextmanager
def reading(checkpoint: str) -> Iterator[None]:
    """A block that reads a checkpoint through a library.

    Raises:
        ResumeError: With what the library says where it cannot.
    """
    try:
        yield
    except TetherError:
        raise
    except Exception as error:  # of many kinds: of torch, safetensors, pickle, json, the file system
        raise ResumeError(
            problem=f"Cannot resume from {checkpoint}: it cannot be read into this trainer.",
            details=f"{type(error).__name__}: {said(error)}.",
            instead="Build the trainer as the checkpoint's run did (model, adapter, optimizer), resume from another "
            "checkpoint, or start a new run.",
        ) from error


def _list_others(checkpoint: Path, saved: AboutRun, own: AboutRun, allowed: Mapping[str, str]) -> None:
    """Logs what differs and is not refused, in one line."""
    pairs = _pairs(saved.training, own.training).items()
    others = {n: _was(n, *both) for n, both in pairs if both[0] != both[1] and n not in allowed}
    sets = {name: both for name, both in _pairs(saved.data, own.data).items() if name != "train"}
    changed = [f"the {name} set is another" for name, (there, here) in sets.items() if there != here]
    texts = [*allowed.values(), *others.values(), *changed]
    if not texts:
        return
    kept = [f"`{name}`" for name in _KEPT if name in others]
    logger.warning(
        f"Resuming from {checkpoint} with other options than its run had: {'; '.join(texts)}."
        + (f" The optimizer goes on with its own {', '.join(kept)}." if kept else "")
        + (" Its random state is that of other processes." if "world_size" in {**others, **allowed} else "")
    )


def _check_same_optimizer(checkpoint: Path, there: Any, here: Any) -> None:
    if there == here or {there, here} <= set(_ALIKE):
        return
    raise ResumeError(
        problem=f"Cannot resume from {checkpoint} with another optimizer: {_was('optim', there, here)}, and the state "
        "in the checkpoint is of the former.",
        instead=f"Set `optim={there!r}`, or start a new run.",
    )


def _other_order(saved: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, str]:
    """The options that change which rows come next; batches of another shape do not if a step has as many pairs."""
    differing = {name: (saved.get(name), own.get(name)) for name in ROW_ORDER if name in saved}
    differing = {name: both for name, both in differing.items() if both[0] != both[1]}
    if _rows_of_step(saved) == _rows_of_step(own):
        differing = {name: both for name, both in differing.items() if name not in _SHAPE}
    if _order_seed(saved) == _order_seed(own):
        differing = {name: both for name, both in differing.items() if name not in _SEEDS}
    why = ", so rows would be left out or come again"
    return {name: _was(name, *both) + why for name, both in differing.items()}


_SHAPE, _SEEDS = ("per_device_train_batch_size", "gradient_accumulation_steps", "world_size"), ("seed", "data_seed")


def _rows_of_step(training: Mapping[str, Any]) -> Any:
    """Pairs of an optimizer step where rows are dealt out in order; else all that the sampler reads."""
    sizes = [training.get(name) for name in _SHAPE]
    is_plain = not (training.get("max_tokens_per_micro_batch") or training.get("dataloader_drop_last"))
    is_plain &= training.get("train_sampling_strategy") in ("random", "sequential")
    return math.prod(sizes) if is_plain else sizes


def _order_seed(training: Mapping[str, Any]) -> Any:
    seed = training.get("data_seed")
    return training.get("seed") if seed is None else seed


def _differing_adapters(saved: Mapping[str, Any], own: Mapping[str, Any]) -> Iterator[str]:
    if bool(saved) != bool(own):
        there, here = (f"an adapter ({_names(each)})" if each else "the model's own weights" for each in (saved, own))
        yield f"it trained {there}, and this trainer trains {here}"
        return
    if saved.keys() != own.keys():
        yield f"it had {_names(saved)}, and this trainer has {_names(own)}"
    for name in (name for name in saved if name in own):
        for key, (there, here) in _pairs(saved[name], own[name]).items():
            if there != here:
                yield _was(f"{key}", there, here) + f" (adapter `{name}`)"


def _names(adapters: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(adapters))


def _pairs(saved: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {name: (saved.get(name), own.get(name)) for name in {**saved, **own}}


def _was(name: str, there: Any, here: Any) -> str:
    return f"`{name}` was {there!r} and is {here!r}"


def _other_rows(there: Any, here: Any) -> str:
    counts = [f"{each['rows']:,} rows" if each and each["rows"] is not None else "a stream" for each in (there, here)]
    what = f"had {counts[0]} and has {counts[1]}" if counts[0] != counts[1] else "has other rows, or in another order"
    return f"the training set {what}, so rows that were trained on could be held out or come again"


def _adapter(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name not in _NOT_COMPARED}


def _digest(dataset: PairDataset, further: tuple[str, ...]) -> dict[str, Any]:
    """The number of rows and a digest of what is trained on, in order; `further` columns are the loss's."""
    if not isinstance(dataset, Dataset):
        return {"rows": None, "digest": None}
    digest = xxh3_64()
    columns = tuple(
        name for name in dict.fromkeys((*TOKEN_COLUMNS, MARGIN_COLUMN, *further)) if name in dataset.column_names
    )
    for table in arrow_tables(dataset, columns) if columns else ():
        for column in table.columns:
            if pa.types.is_floating(column.type) or pa.types.is_integer(column.type):
                digest.update(column.to_numpy().astype(np.float64).tobytes())
            else:
                digest.update(pc.list_value_length(column).to_numpy().astype(np.int64).tobytes())
                digest.update(pc.list_flatten(column).to_numpy().astype(np.int64).tobytes())
    return {"rows": len(dataset), "digest": digest.hexdigest()}


def _plain(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, set | frozenset) else getattr(value, "value", str(value))
