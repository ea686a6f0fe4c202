"""The metrics of a run's pairs: rewards, margins, accuracies, log-probs and token statistics.

Everything is a sum and a weight per pair, kept on the device; one transfer per log. Knows no trainer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from tether.types import PairBatch, PairScores, ResponseLogProbs

# A metric of a micro-batch: what to sum over the pairs, and what to divide the sum by; NaN for a count.
PairMetrics = dict[str, tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]]

# In nats; on average, two float32 scorings by the same weights differ by less (docs/numerics.md).
_TIED_PER_TOKEN = 1e-5
# The metrics of every evaluation; a mixture of experts adds `aux_loss`.
EVALUATED = (
    "loss",
    *(f"rewards/{figure}" for figure in ("chosen", "rejected", "accuracies", "margins")),
    *(f"{kind}/{side}" for kind in ("logps", "logits") for side in ("chosen", "rejected")),
    "entropy",
    "mean_token_accuracy",
    "pairs/total",
    "pairs/tied",
)


def pair_metrics(
    batch: PairBatch,
    scores: PairScores,
    losses: Float[Tensor, " pairs"],
    beta: float | Float[Tensor, " pairs"],
    policy: ResponseLogProbs,
    noise_spread: float = 0.0,
) -> PairMetrics:
    """Every metric of a micro-batch, under TRL's names, with the numbers of pairs and of tied pairs.

    A pair is tied if its margin may be rounding: at most beta times 1e-5 nats per token of the two responses, or twice
    the standard deviation that noise gives it.

    Token statistics are included if the policy's log-probs have them.

    Args:
        noise_spread: Rounding between policy and reference, as `Noise.spread`; 0 if both are computed alike.
    """
    chosen_rewards = beta * scores.chosen_logratios.detach()
    rejected_rewards = beta * scores.rejected_logratios.detach()
    per_pair = {
        "loss": losses.detach(),
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/accuracies": chosen_rewards > rejected_rewards,
        "rewards/margins": chosen_rewards - rejected_rewards,
        "logps/chosen": scores.policy_chosen.detach(),
        "logps/rejected": scores.policy_rejected.detach(),
    }
    one = torch.ones_like(losses, dtype=torch.float32)
    metrics = {name: (value.float(), one) for name, value in per_pair.items()}
    rounding = _TIED_PER_TOKEN * (scores.chosen_lengths + scores.rejected_lengths)
    noise = 2 * noise_spread * torch.hypot(*batch.of_responses(policy.rounding_scales_of_sums()))
    tied = per_pair["rewards/margins"].abs() <= beta * rounding.maximum(noise)
    metrics |= {"pairs/total": (one, torch.nan * one), "pairs/tied": (tied.float(), torch.nan * one)}
    if policy.auxiliary_loss is not None:
        metrics["aux_loss"] = (policy.auxiliary_loss.detach().float() * one, one)
    return metrics | _token_metrics(batch, scores, policy)


def _token_metrics(batch: PairBatch, scores: PairScores, policy: ResponseLogProbs) -> PairMetrics:
    if policy.statistics is None:
        return {}

    def per_pair(values: Tensor) -> tuple[Tensor, Tensor]:
        return batch.of_responses(torch.segment_reduce(values.float(), "sum", offsets=policy.offsets))

    chosen_tokens, rejected_tokens = scores.chosen_lengths.float(), scores.rejected_lengths.float()
    chosen_entropy, rejected_entropy = per_pair(policy.statistics.entropy)
    chosen_logit, rejected_logit = per_pair(policy.statistics.mean_logit)
    chosen_hits, _ = per_pair(policy.statistics.is_top1)
    return {
        "entropy": (chosen_entropy + rejected_entropy, chosen_tokens + rejected_tokens),
        "logits/chosen": (chosen_logit, chosen_tokens),
        "logits/rejected": (rejected_logit, rejected_tokens),
        "mean_token_accuracy": (chosen_hits, chosen_tokens),
    }


class MetricSums:
    """Totals of `PairMetrics` on the device, one set for each optimizer step; `means` is the only transfer."""

    def __init__(self) -> None:
        self._steps: dict[int, dict[str, Tensor]] = {}
        self._once: dict[str, float] = {}

    def add(self, metrics: PairMetrics, num_pairs: int, step: int = 0) -> None:
        """Adds the first `num_pairs` pairs of a micro-batch of an optimizer step."""
        totals = self._steps.setdefault(step, {})
        for name, (values, weights) in metrics.items():
            total = torch.stack([values[:num_pairs].sum(), weights[:num_pairs].sum()]).double()
            totals[name] = totals[name] + total if name in totals else total

    def add_once(self, values: dict[str, float]) -> None:
        """Adds values that are the same on every process, for the next report only."""
        self._once |= values

    def means(self, reduce: Callable[[Tensor], Tensor] = lambda totals: totals) -> dict[str, float]:
        """The report of the steps since the last one; resets the sums.

        A metric is averaged within each step, over all micro-batches and processes together, and then over the steps:
        every step counts equally, as in the loss. Counts are added up.

        Args:
            reduce: Sums a tensor over the processes.
        """
        (once, self._once), (steps, self._steps) = (self._once, {}), (list(self._steps.values()), {})
        if not steps:
            return once
        names = sorted(steps[0])
        by_step = reduce(torch.stack([torch.stack([step[name] for name in names]) for step in steps])).cpu()
        for name, (total, weight) in zip(names, by_step.permute(1, 2, 0), strict=True):
            if weight.isnan().any():
                once[name] = total.sum().item()
            elif weight.any():
                once[name] = (total / weight)[weight > 0].mean().item()
        return once
