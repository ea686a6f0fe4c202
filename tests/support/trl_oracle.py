"""TRL as a second oracle, where it is right: its loss values, its tokens, its curves.

Knows nothing of `tether`. TRL is asked for fp32 and for runs that it gets right (a model loaded by path, full
fine-tuning or a fresh default LoRA).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from support.tiny import ADAM_EPSILON

Row = dict[str, Any]


def trl_loss(
    policy: tuple[Tensor, Tensor],
    reference: tuple[Tensor, Tensor],
    lengths: tuple[Tensor, Tensor],
    **options: Any,
) -> Tensor:
    """TRL's loss (the mean over pairs) of given sequence log-probs.

    Args:
        policy: Chosen and rejected log-probs of the policy, one entry per pair.
        reference: The same of the reference.
        lengths: Tokens of the chosen and the rejected responses.
        options: `loss_type` (a name or several), and the other numbers of `_LossOnly`.
    """
    width = int(torch.cat(lengths).max())

    def tokens(sums: tuple[Tensor, Tensor]) -> Tensor:
        # The whole of a sequence's log-prob stands at its first token.
        first = torch.nn.functional.one_hot(torch.tensor(0), width)
        return torch.cat(sums)[:, None] * first

    return trl_loss_of_tokens(tokens(policy), tokens(reference), torch.cat(lengths), **options)


def trl_loss_of_tokens(
    policy: Tensor, reference: Tensor, lengths: Tensor, log_sum_sq: Tensor | None = None, **options: Any
) -> Tensor:
    """TRL's loss (the mean over pairs) of given token log-probs.

    Args:
        policy: Log-probs of the policy: all chosen, then all rejected responses, padded with 0.
        reference: The same of the reference.
        lengths: Tokens of each of these.
        log_sum_sq: Of each token `log sum_v p(v)^2` under the policy; needed for `use_weighting`.
        options: `loss_type` (a name or several), and the other numbers of `_LossOnly`.
    """
    width = policy.shape[1] + 1
    completion_mask = (torch.arange(width) >= 1) & (torch.arange(width) <= lengths[:, None])
    zeros = torch.zeros_like(policy)

    def outputs(log_probs: Tensor) -> SimpleNamespace:
        return SimpleNamespace(
            log_probs=log_probs,
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
            log_sum_sq_probs=log_sum_sq,
        )

    inputs = {
        "input_ids": torch.zeros_like(completion_mask, dtype=torch.long),
        "attention_mask": torch.ones_like(completion_mask, dtype=torch.long),
        "completion_mask": completion_mask.long(),
    }
    trainer = _LossOnly(lambda **_: outputs(reference), **options)
    with _numbers_in(policy.dtype):
        loss: Tensor = DPOTrainer._compute_loss(trainer, lambda **_: outputs(policy), inputs, False)
    return loss


@contextmanager
def _numbers_in(dtype: torch.dtype) -> Iterator[None]:
    """TRL makes tensors of options (EXO's label smoothing) in torch's default dtype: fp32, whatever the loss is in."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _Policy(torch.nn.Module):
    is_gradient_checkpointing = False


class _LossOnly(SimpleNamespace):
    """What `DPOTrainer._compute_loss` reads of its trainer, and nothing else."""

    def __init__(
        self,
        ref_model: Any,
        loss_type: str | list[str],
        loss_weights: list[float] | None = None,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        f_divergence_type: str = "reverse_kl",
        f_alpha_divergence_coef: float = 0.5,
        discopop_tau: float = 0.05,
        ld_alpha: float | None = None,
        use_weighting: bool = False,
    ) -> None:
        names = [loss_type] if isinstance(loss_type, str) else loss_type
        super().__init__(
            model=_Policy(),
            ref_model=ref_model,
            args=SimpleNamespace(discopop_tau=discopop_tau, gradient_checkpointing_kwargs=None),
            accelerator=SimpleNamespace(
                device=torch.device("cpu"), gather=lambda value: value, gather_for_metrics=lambda value: value
            ),
            aux_loss_enabled=False,
            ld_alpha=ld_alpha,
            precompute_ref_logps=False,
            f_divergence_type=f_divergence_type,
            f_alpha_divergence_coef=f_alpha_divergence_coef,
            loss_types=names,
            loss_weights=loss_weights or [1.0] * len(names),
            beta=beta,
            label_smoothing=label_smoothing,
            use_weighting=use_weighting,
            _metrics={"train": defaultdict(list)},
            _total_train_tokens=0,
            _tp_size=1,
        )


def trl_tokens(rows: list[Row] | Dataset, tokenizer: PreTrainedTokenizerBase, **options: Any) -> list[Row]:
    """`prompt_ids`, `chosen_ids` and `rejected_ids` of each row that TRL keeps."""
    options = {"max_length": None, "truncation_mode": "keep_start", "dataset_num_proc": None} | options
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    tokens = DPOTrainer._prepare_dataset(
        trainer,
        rows if isinstance(rows, Dataset) else Dataset.from_list(rows),
        tokenizer,
        SimpleNamespace(**options),
        "train",
    )
    return [{name: row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")} for row in tokens]


def trl_batch(tokens: list[Row], max_length: int, truncation_mode: str) -> list[tuple[list[int], list[int]]]:
    """What TRL feeds for tokenized rows: ids and completion mask of each chosen, then of each rejected sequence."""
    fed = DataCollatorForPreference(0, max_length, truncation_mode)(tokens)
    rows = zip(fed["input_ids"], fed["completion_mask"], fed["attention_mask"].bool(), strict=True)
    return [(ids[mask].tolist(), completion[mask].tolist()) for ids, completion, mask in rows]


def trl_curve(
    model: str | Path, rows: list[Row], tokenizer: PreTrainedTokenizerBase, output_dir: Path, **options: Any
) -> list[dict[str, float]]:
    """The training log of a run with TRL, one entry per step (without its summary)."""
    peft_config = options.pop("peft_config", None)
    options = {"bf16": False, "report_to": [], "save_strategy": "no", "adam_epsilon": ADAM_EPSILON} | options
    trainer = DPOTrainer(
        model=str(model),
        args=DPOConfig(str(output_dir), disable_tqdm=True, **options),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    trainer.train()
    return trainer.state.log_history[:-1]


def trl_evaluation(
    model: str | Path, rows: list[Row], eval_rows: list[Row], tokenizer: PreTrainedTokenizerBase, output_dir: Path
) -> dict[str, float]:
    """The figures of an evaluation with TRL, before training, 4 pairs a batch."""
    trainer = DPOTrainer(
        model=str(model),
        args=DPOConfig(str(output_dir), bf16=False, report_to=[], disable_tqdm=True, per_device_eval_batch_size=4),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(eval_rows),
        processing_class=tokenizer,
    )
    figures: dict[str, float] = trainer.evaluate()
    return figures
