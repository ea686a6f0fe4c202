"""The package's shared values: batches of pairs, log-probabilities of responses, and scores of pairs.

Knows tensors only: no model, no file, no trainer.

Legend of shapes (used in every annotation of the package):

    pairs       preference pairs of a micro-batch
    groups      distinct prompts of a micro-batch
    responses   distinct (prompt, response) combinations of a micro-batch; at most 2 * pairs
    tokens      response tokens of a micro-batch, concatenated

Log-probabilities are natural logarithms (nats), in fp32 unless a caller asks for more.
"""

from tether.types.batch import PairBatch, Response, TruncationMode
from tether.types.images import PromptImages, image_inputs
from tether.types.log_probs import ResponseLogProbs, TokenStatistics, join_log_probs
from tether.types.ragged import copies_later, offsets_of, on_device, placed, places_of
from tether.types.scores import PairScores, PairTokens, TokenScores, scored_tokens

__all__ = [
    "PairBatch",
    "PairScores",
    "PairTokens",
    "PromptImages",
    "Response",
    "ResponseLogProbs",
    "TokenScores",
    "TokenStatistics",
    "TruncationMode",
    "copies_later",
    "image_inputs",
    "join_log_probs",
    "offsets_of",
    "on_device",
    "placed",
    "places_of",
    "scored_tokens",
]
