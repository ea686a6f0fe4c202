"""Scores responses under a language model: one engine for the policy and for every reference."""

from tether.scoring.head import LogitTransform, token_log_probs
from tether.scoring.layout import ScoringRows, packed_rows, padded_rows
from tether.scoring.reading import Reads, reads_of
from tether.scoring.rotary import rotary_limit, uneven_forwards
from tether.scoring.score import SCORING_VERSION, restore_attention, score

__all__ = [
    "SCORING_VERSION",
    "LogitTransform",
    "Reads",
    "ScoringRows",
    "packed_rows",
    "padded_rows",
    "reads_of",
    "restore_attention",
    "rotary_limit",
    "score",
    "token_log_probs",
    "uneven_forwards",
]
