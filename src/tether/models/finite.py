"""Whether training still produces finite numbers: the loss of every step, and weights before they are saved.

Knows tensors and processes; knows no trainer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tether.distributed import forget_gathered, has_shards, local_shard, names_of_all, reduced
from tether.errors import NotFiniteError

_INSTEAD = (
    "Lower `learning_rate`, add `warmup_steps`, keep `max_grad_norm` above 0, or remove a row that overflows. You can "
    "resume from a checkpoint before that step: its weights are finite."
)


class LossWatch:
    """The first optimizer step whose loss is NaN or infinite, kept on the device so that no step waits for it."""

    def __init__(self) -> None:
        self._first_broken: Tensor | None = None

    def see(self, loss: Tensor, step: int) -> None:
        """Takes note of the loss of a micro-batch."""
        broken = torch.where(torch.isfinite(loss.detach()), torch.inf, float(step))
        before = self._first_broken
        self._first_broken = broken if before is None else torch.minimum(before, broken)

    def check(self) -> None:
        """Reads and resets the record. Collective; every process reaches the same verdict.

        Raises:
            NotFiniteError: If the loss of a step was NaN or infinite on any process; names the first one.
        """
        seen, self._first_broken = self._first_broken, None
        if seen is None:
            return
        first = -float(reduced(-seen, "max"))
        if first < float("inf"):
            raise NotFiniteError(
                problem=f"Cannot continue training: the loss of step {first:.0f} is NaN or infinite.",
                details="Its gradient makes the weights NaN permanently. The usual causes are a learning rate that is "
                "too high, and numbers that overflow in the policy or in the reference.",
                instead=_INSTEAD,
            )


def check_weights(model: nn.Module, purpose: str, step: int) -> None:
    """Refuses to use trained weights that are NaN or infinite. Collective if they are sharded.

    Args:
        model: The policy.
        purpose: What they are needed for, for the message: "keep the policy".
        step: Number of optimizer steps it has been trained for.

    Raises:
        NotFiniteError: Names the first such weight.
    """
    forget_gathered(model)  # FSDP2 has other objects under these names while it holds them whole
    parts = {name: local_shard(p) for name, p in model.named_parameters() if p.requires_grad}
    broken = [name for name, part in parts.items() if not is_finite(part)]
    if has_shards(model):
        broken = names_of_all(broken)
    if broken:
        others = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise NotFiniteError(
            problem=f"Cannot {purpose}: after step {step} its weight `{broken[0]}`{others} is NaN or infinite.",
            details="Training broke it in this step or shortly before. Tether never saves such weights.",
            instead=_INSTEAD,
        )


_HAVE_EXTREMES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_finite(tensor: Tensor) -> bool:
    """Whether none of the numbers is NaN or infinite; in the usual dtypes, without a second tensor of this size."""
    if tensor.dtype not in _HAVE_EXTREMES:
        return bool((tensor if tensor.is_complex() else tensor.float()).isfinite().all())
    # A NaN propagates to both extremes, which take a fifteenth of the time of an infinity norm.
    return tensor.numel() == 0 or bool(torch.stack(torch.aminmax(tensor.detach())).isfinite().all())
