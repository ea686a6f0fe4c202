"""`FreeReference`: no reference at all; every response is as likely as any other.

Knows no model.
"""

from __future__ import annotations

import torch

from tether.reference.base import Kind, Reference
from tether.reference.identity import ReferenceIdentity
from tether.types import PairBatch, ResponseLogProbs, offsets_of


class FreeReference(Reference):
    """The reference of reference-free training: `log pi_ref(y|x) = 0` for every response.

    Any other constant gives the same loss if the loss uses only the difference of two responses. A reward is
    `beta log pi_theta(y|x)`, and nothing pulls the policy back to where it started.

    Example:
        >>> from tether.types import Response
        >>> batch = PairBatch.of_pairs([(Response((1,), (2, 3)), Response((1,), (4,)))])
        >>> FreeReference().log_probs(batch).sums()
        tensor([0., 0.])
    """

    kind = Kind("free", "none, so that every response is as likely as any other")

    @property
    def identity(self) -> ReferenceIdentity:
        return ReferenceIdentity(self.kind.name, weights="none", compute_dtype="float32", scoring_version=0)

    def log_probs(self, batch: PairBatch) -> ResponseLogProbs:
        zeros = torch.zeros(sum(batch.response_lengths), device=batch.device)
        return ResponseLogProbs(zeros, offsets_of(batch.response_lengths, batch.device))
