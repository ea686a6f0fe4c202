"""Scores responses under a language model: one engine for the policy and for every reference."""

from tether.scoring.head import LogitTransform, token_log_probs
from tether.scoring.layout import ScoringRows, packed_rows, padded_rows
from tether.scoring.rotary import rotary_limit, uneven_forwards
from tether.scoring.score import SCORING_VERSION, restore_attention, score

__all__ = [
    "SCORING_VERSION",
    "LogitTransform",
    "ScoringRows",
    "packed_rows",
    "padded_rows",
    "restore_attention",
    "rotary_limit",
    "score",
    "token_log_probs",
    "uneven_forwards",
]
