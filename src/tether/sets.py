"""A trainer's sets of pairs: tokenized as its options say, and the names that messages and stores give them.

Knows options and datasets; knows no model and no reference.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TypeAlias

from transformers import PreTrainedTokenizerBase

from tether.config import DPOConfig
from tether.data import PairDataset, Rows, as_dataset, progress_bars_off, tokenize_pairs

# What a trainer takes and keeps as its sets to evaluate on: none, one, or several by name.
EvalSets: TypeAlias = PairDataset | dict[str, PairDataset] | None


class SetReader:
    """Makes tokenized sets of what a user passes.

    Args:
        tokenizer: With a chat template if rows are conversational.
        args: The run's options.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, args: DPOConfig) -> None:
        self._tokenizer, self._args = tokenizer, args

    def read(self, rows: Rows | None, name: str) -> PairDataset:
        """One set, tokenized, without the rows that cannot be used; `name` is for messages."""
        dataset, args = as_dataset(rows), self._args
        quiet = args.disable_tqdm or not sys.stderr.isatty()
        with args.main_process_first(desc=f"tokenizing the {name} set"), progress_bars_off(quiet):
            return tokenize_pairs(
                dataset,
                self._tokenizer,
                max_length=args.max_length,
                truncation_mode=args.truncation_mode,
                num_proc=args.dataset_num_proc,
                name=name,
                bad_rows=args.bad_rows,
            )

    def read_all(self, sets: Rows | Mapping[str, Rows] | None) -> EvalSets:
        """The sets to evaluate on, in the form in which they were passed."""
        if sets is None:
            return None
        if isinstance(sets, Mapping):
            return {name: self.read(rows, name) for name, rows in sets.items()}
        return self.read(sets, "eval")


def named_sets(train: PairDataset | None, eval_sets: EvalSets) -> dict[str, PairDataset]:
    """All sets by the names that they have in messages: `train`, and `eval` or `eval_NAME`."""
    named = {} if train is None else {"train": train}
    if isinstance(eval_sets, Mapping):
        return named | {f"eval_{name}": dataset for name, dataset in eval_sets.items()}
    return named if eval_sets is None else named | {"eval": eval_sets}
