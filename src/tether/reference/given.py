"""`GivenReference`: rows that bring their own log-probs, in the columns `ref_chosen_logps` and `ref_rejected_logps`.

Knows sums only; knows no model, no store and no column.
"""

from __future__ import annotations

import torch

from tether.errors import MissingLogProbsError
from tether.reference.base import Kind, Reference, Traits
from tether.reference.identity import ReferenceIdentity
from tether.types import PairBatch, ResponseLogProbs, offsets_of, on_device


class GivenReference(Reference):
    """The rows bring the reference: the sum of each response's log-probs, computed elsewhere.

    No model runs and no weights are held. Which model the sums come from, and whether it saw the same tokens, cannot
    be checked here. How a sum is spread over the response's tokens is not known (`Traits.knows_tokens` is False), so
    all of it stands at the first token.

    Args:
        digest: Of the given numbers, if they can be known in advance; distinguishes one set of them from another.
        means_policy: They are meant to be the initial policy's.
    """

    kind = Kind("given", "log-probs that the rows brought along")

    def __init__(self, digest: str, *, means_policy: bool = False) -> None:
        self._means_policy = means_policy
        self._identity = ReferenceIdentity(self.kind.name, weights=digest, compute_dtype="float32", scoring_version=0)

    @property
    def identity(self) -> ReferenceIdentity:
        return self._identity

    @property
    def traits(self) -> Traits:
        return Traits(means_policy=self._means_policy, answers_are_stored=True, knows_tokens=False)

    def log_probs(self, batch: PairBatch) -> ResponseLogProbs:
        sums = [known for known in batch.reference_sums if known is not None]
        if len(sums) != batch.num_responses:
            raise MissingLogProbsError(
                problem="Cannot use a row without `ref_chosen_logps` and `ref_rejected_logps`: the training rows bring "
                "their reference log-probs, so there is no model to compute them with.",
                instead="Add the two columns to this set too, or remove them from the training set "
                "(`dataset.remove_columns`) to have a model compute the reference log-probs.",
            )
        offsets = offsets_of(batch.response_lengths, batch.device)
        values = torch.zeros(sum(batch.response_lengths), device=batch.device)
        values[offsets[:-1]] = on_device(torch.tensor(sums), batch.device)
        return ResponseLogProbs(values, offsets)
