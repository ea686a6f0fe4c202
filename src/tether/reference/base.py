"""The contract of every reference: its identity, its log-probs of a batch, and its life around training.

The trainer calls these methods on whatever reference it holds and never checks which kind it is. Implementations are
final; behaviour is added by wrapping (`WrappingReference`), not by overriding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from tether.distributed import device_of
from tether.errors import ReferenceModelError
from tether.reference.held import Slot
from tether.reference.identity import ReferenceIdentity
from tether.scoring import Reads, score
from tether.scoring.at_rest import multiplies_in_tf32
from tether.scoring.evaluation import evaluation_mode, running_in
from tether.types import PairBatch, ResponseLogProbs

BatchSource = Callable[[], Iterable[PairBatch]]


class Kind(NamedTuple):
    """A kind of reference, as it appears in the model card.

    Attributes:
        name: A word or two; of one that is not precomputed, the `kind` of its identity.
        description: What the reference is, to follow "the reference:".
        paper: The arXiv number of the paper it comes from, if not DPO's.
    """

    name: str
    description: str = ""
    paper: str | None = None


@dataclass(frozen=True)
class Traits:
    """What the trainer must take into account when it uses a reference.

    Attributes:
        means_policy: It is meant to be the initial policy, so both must score alike before the first step.
        moves: Training moves it on purpose.
        is_collective: A pass gathers sharded weights, so every process must make it at the same time.
        runs_in_policy: A pass runs through the policy's own modules, and needs them where training puts them.
        answers_are_stored: Answers may come from an earlier pass, made in other batches or on another machine.
        knows_tokens: The log-prob of each token is known; if not, only the sum is, and stands at the first token.
    """

    means_policy: bool = False
    moves: bool = False
    is_collective: bool = False
    runs_in_policy: bool = False
    answers_are_stored: bool = False
    knows_tokens: bool = True


class Reference(ABC):
    """`pi_ref`: gives the log-probs of the responses in a batch.

    `log_probs` is the core. Around it, `prepare` runs before training with the batches to come, `advance` after every
    optimizer step, `save` and `load` with every checkpoint, `release` when the weights are no longer needed. By
    default each of these does nothing.
    """

    @property
    @abstractmethod
    def identity(self) -> ReferenceIdentity:
        """What distinguishes this reference from others; constant over its life."""

    @abstractmethod
    def log_probs(self, batch: PairBatch) -> ResponseLogProbs:
        """Per-token log-probabilities of every response under the reference.

        Without gradient and without dropout; leaves the policy's mode, active adapter, `requires_grad`, hooks and
        random state as they were.

        Args:
            batch: The pairs, on any device.

        Returns:
            Values in nats, fp32, on the device of the batch, in its order of responses.
        """

    @property
    def num_passes(self) -> int:
        """Forward passes made; stored answers are not counted."""
        return 0

    @property
    def kind(self) -> Kind:
        """What the reference is called and described as; set it on the class."""
        return Kind(self.identity.kind)

    @property
    def traits(self) -> Traits:
        """What the trainer must take into account when it uses the reference."""
        return Traits()

    def changed_tensors(self) -> list[str]:
        """Names of tensors that have changed since the reference was made."""
        return []

    def held_by_others(self) -> list[Slot]:
        """Where the tensors are that shape its answers, must not change, and belong to someone else as well."""
        return []

    def keep(self, names: Collection[str]) -> bool:
        """Takes copies of some of what others hold, by name, because it begins to train; each still has the value that
        it had when the reference was made. Returns whether the reference can do that.
        """
        return False

    @property
    def length_limit(self) -> int | None:
        """Tokens of prompt and response above which an answer depends on the length fed; None if it never does."""
        return None

    @property
    def reads(self) -> Reads | None:
        """Which texts it can be asked that are no rows of the run; None if only the rows' own tokens are known."""
        return None

    @property
    def extra_bytes(self) -> int:
        """Bytes of weights held in addition to the policy's."""
        return 0

    @property
    def module(self) -> nn.Module | None:
        """The reference's own model, if it has one that is not the policy."""
        return None

    def in_policy(self) -> AbstractContextManager[None]:
        """While open, the policy's own forward computes what the reference computes.

        Raises:
            ReferenceModelError: If the reference is not the policy in another state.
        """
        raise ReferenceModelError(
            problem=f"Cannot use the policy as its own reference (`null_ref_context`): the {self.identity.kind} "
            "reference is separate from the policy.",
            instead="Use the reference itself: `trainer.reference.log_probs(batch)` or `trainer.ref_model`.",
        )

    def figures(self) -> dict[str, float]:
        """Metrics it adds to the log, the same on every process."""
        return {}

    def export(self, folder: Path | None, *, merged: bool = False) -> None:
        """Saves the reference as a model or adapter that transformers and PEFT load.

        Called on every process, because sharded tensors are gathered; only the one that writes gets the folder.

        Args:
            folder: Where to save; None on a process that only takes part.
            merged: Save a plain model, with the adapter merged into its weights.

        Raises:
            ReferenceModelError: If the reference holds no weights to save.
        """
        raise ReferenceModelError(
            problem=f"Cannot save the {self.identity.kind} reference as a model: it has no weights of its own.",
            instead="Save the model that it was made from.",
        )

    def prepare(self, sets: Mapping[str, BatchSource], *, show_progress: bool = False) -> None:
        """Called before training (and before evaluating a new set) with the batches to come."""
        return None

    def advance(self, step: int) -> bool:
        """Called after optimizer step `step`, counted from 1. Returns whether the reference moved."""
        return False

    def save(self, folder: Path | None) -> None:
        """Writes the state that cannot be rebuilt from the user's inputs.

        Called on every process, because sharded tensors are gathered; only the one that writes gets the folder.
        """
        return None

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote."""
        return None

    def release(self) -> None:
        """Frees weights that are not needed, or no longer right, once training starts."""
        return None


def score_without_gradient(model: nn.Module, batch: PairBatch, autocast_dtype: torch.dtype | None) -> ResponseLogProbs:
    """One scoring pass as every reference makes it: no gradient, no dropout, the policy's autocast.

    `no_grad` rather than inference mode: inference tensors break a later training forward of sharded weights.
    """
    with torch.no_grad(), evaluation_mode(model), running_in(autocast_dtype, device_of(model)):
        log_probs = score(model, batch)
    return ResponseLogProbs(log_probs.values.to(batch.device), log_probs.offsets.to(batch.device))


def compute_dtype_name(model: nn.Module, autocast_dtype: torch.dtype | None) -> str:
    """Dtype of the model's matrix products, as the identity records it: `tf32` where a GPU so rounds float32."""
    dtype = autocast_dtype or next(p.dtype for p in model.parameters() if p.is_floating_point())
    if dtype == torch.float32 and torch.cuda.is_available() and multiplies_in_tf32():
        return "tf32"
    return str(dtype).removeprefix("torch.")
