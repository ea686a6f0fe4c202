"""What a run is asked to do, before anything is done: the one value that its rules are about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from accelerate.utils import parse_flag_from_env
from datasets import IterableDataset
from transformers import PreTrainedTokenizerBase

from tether.config.dpo_config import DPOConfig
from tether.data.datasets import REFERENCE_COLUMNS, PairDataset, column_names
from tether.data.rows import has_image_column
from tether.data.truncation import Truncation
from tether.losses import Objective
from tether.reference.adapter_tensors import is_adapter_model

if TYPE_CHECKING:
    from peft import PeftConfig


def will_shard(args: DPOConfig) -> bool:
    """Whether training will cut weights over processes (ZeRO-3, FSDP2), as far as options and launcher say."""
    plugin = args.deepspeed_plugin
    if plugin is not None:
        return bool(plugin.zero_stage == 3)
    launched = parse_flag_from_env("ACCELERATE_USE_FSDP")
    return args.world_size > 1 and (bool(args.fsdp) or launched)


@dataclass(frozen=True)
class Facts:
    """What a run is asked to do.

    Attributes:
        args: The options.
        policy: The model to train, as it is now.
        ref_model: The reference model, if one is named.
        reference: A reference of the user's own, or a function of the policy that returns one.
        new_adapter: The adapter that the policy will get.
        optimizer: An optimizer of the user's own.
        tokenizer: What makes token ids of the rows.
        sets: The sets by name, `train` first, as they were passed.
        truncation: How rows will be cut.
        objective: What the run minimises.
        has_own_figures: Whether evaluation may have further figures: of `compute_metrics`, a subclass or a callback.
        leaders: Callbacks whose averages set the reference's weights (`BEMACallback(update_ref_model=True)`).
        is_sharded: Whether training will cut weights over processes.
    """

    args: DPOConfig
    policy: Any
    ref_model: Any
    reference: Any
    new_adapter: PeftConfig | None
    optimizer: Any
    tokenizer: PreTrainedTokenizerBase
    sets: Mapping[str, PairDataset]
    truncation: Truncation
    objective: Objective
    has_own_figures: bool
    leaders: list[Any]
    is_sharded: bool

    @property
    def has_adapter(self) -> bool:
        return self.new_adapter is not None or is_adapter_model(self.policy)

    @property
    def follows_average(self) -> bool:
        return bool(self.leaders)

    @property
    def streams(self) -> bool:
        return any(isinstance(dataset, IterableDataset) for dataset in self.sets.values())

    @property
    def trains_on_stream(self) -> bool:
        return isinstance(self.sets.get("train"), IterableDataset)

    @cached_property
    def columns(self) -> dict[str, tuple[str, ...]]:
        """Of each set; a stream that does not say has those of its first row."""
        return {name: column_names(dataset) for name, dataset in self.sets.items()}

    @property
    def brings_log_probs(self) -> bool:
        """Whether the rows bring the reference's log-probs."""
        return any(set(REFERENCE_COLUMNS) & set(names) for names in self.columns.values())

    @property
    def sets_with_images(self) -> list[str]:
        return [name for name, columns in self.columns.items() if has_image_column(columns)]
