"""A trainer's sets of pairs: tokenized as its options say, and the names that messages and stores give them.

Knows options and datasets, and of models what ids they embed; knows no reference.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeAlias

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from tether.config.dpo_config import DPOConfig
from tether.data.collators import Collator, pair_collator
from tether.data.columns import WithColumns, named_as_ours
from tether.data.datasets import PairDataset, Rows, as_dataset, tokenize_pairs, truncation_of
from tether.data.image_rows import ImageRows
from tether.data.rows import RowReader, TextRows, has_image_column
from tether.data.tokenizing import largest_id, name_of_row, progress_bars_off
from tether.data.truncation import Truncation
from tether.errors import ConfigurationError, DataError
from tether.models.loading import tokenizer_of
from tether.models.preparing import check_embeds
from tether.trainer.evaluation import WithTokenIds

# What a trainer takes and keeps as its sets to evaluate on: none, one, or several by name.
EvalSets: TypeAlias = PairDataset | dict[str, PairDataset] | None


class SetReader:
    """Makes tokenized sets of what a user passes.

    Args:
        processing_class: A tokenizer, or the processor of a vision-language model; with a chat template if rows are
            conversational.
        args: The run's options.
        data_collator: What the trainer was given to make batches with, if anything.
        max_positions: Tokens of the longest row that the run's models have positions for; None for no limit.

    Attributes:
        collator: What makes its batches.
        truncation: Where rows are cut, as far as it is known: a collator of another making is taken to follow the
            options.
        image_rows: What reads the rows' images; None where only a tokenizer is at hand.
    """

    collator: Collator
    truncation: Truncation

    def __init__(
        self,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        args: DPOConfig,
        data_collator: Any = None,
        max_positions: int | None = None,
    ) -> None:
        self._args, self._max_positions = args, max_positions
        self.image_rows = ImageRows(processing_class) if isinstance(processing_class, ProcessorMixin) else None
        self._reader: RowReader = self.image_rows or TextRows(tokenizer_of(processing_class))
        self.use_collator(data_collator)

    def use_collator(self, given: Any) -> None:
        """Makes batches with another collator from now on, or with the trainer's own."""
        args = self._args
        made: Any = pair_collator(given, args.max_length, args.truncation_mode, self.image_rows)
        self.truncation = truncation_of(made) or Truncation(args.max_length, args.truncation_mode)
        if args.pair_columns.names:
            made = WithColumns(made, args.pair_columns)
        former = getattr(self, "collator", None)
        self.collator = replace(former, collator=made) if isinstance(former, WithTokenIds) else made

    def add_token_ids(self, pad_token_id: int) -> None:
        """Puts padded token ids into each batch, for `include_for_metrics=["inputs"]`."""
        self.collator = WithTokenIds(self.collator, pad_token_id)

    def read(self, rows: Rows | None, name: str) -> PairDataset:
        """One set, tokenized, without the rows that cannot be used; `name` is for messages."""
        args = self._args
        dataset = named_as_ours(as_dataset(rows), args.columns, name)
        if self.image_rows and self.truncation.mode == "keep_end" and has_image_column(dataset.column_names or ()):
            _refuse_keep_end(name, self.truncation)
        quiet = args.disable_tqdm or not sys.stderr.isatty()
        first = args.main_process_first(desc=f"tokenizing the {name} set")
        with first, progress_bars_off(quiet), refusing_damaged_text(name):
            tokenized = tokenize_pairs(
                dataset,
                self._reader,
                max_length=self.truncation.max_length,
                truncation_mode=self.truncation.mode,
                num_proc=args.dataset_num_proc,
                name=name,
                bad_rows=args.bad_rows,
                max_positions=self._max_positions,
            )
        args.pair_columns.check(tokenized, name)
        return tokenized

    def as_datasets(self, sets: Rows | Mapping[str, Rows] | None) -> EvalSets:
        """The sets to evaluate on, as datasets, in the form in which they were passed."""
        return _each(
            sets, lambda rows, name: as_dataset(rows, "`eval_dataset`" if rows is sets else f"`eval_dataset[{name!r}]`")
        )

    def read_all(self, sets: Rows | Mapping[str, Rows] | None) -> EvalSets:
        """The sets to evaluate on, in the form in which they were passed."""
        return _each(sets, self.read)


@contextmanager
def refusing_damaged_text(name: str) -> Iterator[None]:
    """Raises a `DataError` where the block reads text of a set that is none, as in a file with a flipped bit."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(
            problem=f"Cannot read the {name} set: it has text that is not UTF-8 ({error.reason}).",
            details=f"Byte {error.start} of it is wrong. The text begins {error.object[:60]!r}.",
            instead="Copy its file again from where it was written, or write it anew: it is damaged.",
        ) from error


def _each(sets: Rows | Mapping[str, Rows] | None, make: Callable[[Rows, str], PairDataset]) -> EvalSets:
    """One set or several by name, each made anew; a mapping that has the columns of a set is one."""
    if sets is None:
        return None
    if isinstance(sets, Mapping) and not {"chosen", "rejected"} & set(sets):
        return {str(name): make(rows, str(name)) for name, rows in sets.items()}
    return make(sets, "eval")


def _refuse_keep_end(name: str, truncation: Truncation) -> None:
    if truncation.max_length is not None:
        raise ConfigurationError(
            problem=f"Cannot use `truncation_mode='keep_end'` with `max_length={truncation.max_length}` for the "
            f"{name} set, which has images: it would cut the start of a prompt, and the places of the images with it.",
            instead="Set `truncation_mode='keep_start'`, or `max_length=None`.",
        )


def named_sets(train: PairDataset | None, eval_sets: EvalSets) -> dict[str, PairDataset]:
    """All sets by the names that they have in messages: `train`, and `eval` or `eval_NAME`."""
    named = {} if train is None else {"train": train}
    if isinstance(eval_sets, Mapping):
        return named | {f"eval_{name}": dataset for name, dataset in eval_sets.items()}
    return named if eval_sets is None else named | {"eval": eval_sets}


def check_ids(sets: Mapping[str, PairDataset], policy: Any) -> None:
    """Refuses rows with a token id that the policy has no embedding for.

    Tokens of images are placeholders, which a model may not embed: sets with images are not looked at.
    """
    for name, dataset in sets.items():
        if isinstance(dataset, Dataset) and not has_image_column(dataset.column_names):
            largest, row = largest_id(dataset)
            check_embeds(policy, largest, name_of_row(dataset, row, name))
