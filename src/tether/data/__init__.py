"""From rows of any format to token ids, keys and batches; the only place that tokenizes and truncates."""

from tether.data.collators import DataCollatorForPreference, DataCollatorForVisionPreference
from tether.data.datasets import PairCollator, PairDataset, Rows, as_dataset, batch_of, tokenize_pairs
from tether.data.truncation import Truncation

__all__ = [
    "DataCollatorForPreference",
    "DataCollatorForVisionPreference",
    "PairCollator",
    "PairDataset",
    "Rows",
    "Truncation",
    "as_dataset",
    "batch_of",
    "tokenize_pairs",
]
