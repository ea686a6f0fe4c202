"""The three sides of every comparison: Tether, TRL, and a plain hand-written loop, on the same rows and weights."""

from __future__ import annotations

import copy
import logging
import os
import tempfile
import warnings
from functools import cached_property
from typing import Any

import torch
from datasets import Dataset
from torch.nn.functional import logsigmoid

BETA, LEARNING_RATE = 0.1, 1e-6
_TEXT = [{"prompt": "a b", "chosen": " c", "rejected": " d"}] * 8


def quiet() -> None:
    """Keeps the libraries' chatter out of the tables."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for name in ("transformers", "trl", "accelerate", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)  # options of transformers that are about to be renamed
    from datasets import disable_progress_bars

    disable_progress_bars()


class Side:
    """One way to train: a step on a batch of rows, and the reference pass on its own."""

    name: str

    def step(self, rows: list[dict[str, Any]]) -> torch.Tensor:
        """The loss, which stays where it is: reading it would be a wait for the device that no trainer has."""
        raise NotImplementedError

    def reference_pass(self, rows: list[dict[str, Any]]) -> None:
        raise NotImplementedError


class TrainerSide(Side):
    """A trainer's collator, training step and optimizer, the last two as its `train` prepares them."""

    trainer: Any

    @cached_property
    def _model(self) -> Any:
        """The model under autocast, if there is any, and with activations recomputed, if they are."""
        if self.trainer.args.gradient_checkpointing:
            self.trainer.model.gradient_checkpointing_enable()
        model, _ = self.trainer._prepare_for_training(100, None, None)
        return model

    def _update(self) -> None:
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()


class TetherSide(TrainerSide):
    """`tether.DPOTrainer`."""

    name = "tether"

    def __init__(
        self, model: Any, tokenizer: Any, device: str, *, batch_size: int = 8, rows: Any = None, **options: Any
    ):
        from tether import DPOConfig, DPOTrainer

        peft_config = options.pop("peft_config", None)
        self.trainer = DPOTrainer(
            model,
            args=DPOConfig(**_options(batch_size, device, options)),
            train_dataset=Dataset.from_list(rows or _TEXT),
            processing_class=tokenizer,
            peft_config=peft_config,
        )
        self._steps = 0

    def step(self, rows: list[dict[str, Any]]) -> torch.Tensor:
        model, trainer = self._model, self.trainer
        inputs = trainer.data_collator(rows)
        pairs = trainer._get_num_items_in_batch([inputs], trainer.args.device)
        loss = trainer.training_step(model, inputs, pairs)
        self._update()
        self._steps += 1
        trainer.reference.advance(self._steps)
        return loss

    def reference_pass(self, rows: list[dict[str, Any]]) -> None:
        batch = self.trainer._prepare_inputs(self.trainer.data_collator(rows))["batch"]
        self.trainer.reference.log_probs(batch)


class TRLSide(TrainerSide):
    """`trl.DPOTrainer`."""

    name = "trl"

    def __init__(self, model: Any, tokenizer: Any, device: str, *, batch_size: int = 8, **options: Any):
        from trl import DPOConfig, DPOTrainer

        peft_config = options.pop("peft_config", None)
        self._precomputed = options.pop("precompute_ref_log_probs", False)
        rows = options.pop("rows", None)
        loads_reference = peft_config is not None or os.path.isdir(model.config._name_or_path)
        arguments = _options(batch_size, device, options)
        arguments.setdefault("bf16", False)
        self.trainer = DPOTrainer(
            model,
            ref_model=None if loads_reference else copy.deepcopy(model),
            args=DPOConfig(**arguments, precompute_ref_log_probs=False),
            train_dataset=Dataset.from_list(rows or _TEXT),
            processing_class=tokenizer,
            peft_config=peft_config,
        )
        self.trainer.current_gradient_accumulation_steps = 1
        # With precomputed log-probs TRL reads two columns; what stands in them does not change the time.
        self.trainer.precompute_ref_logps = self._precomputed
        if self._precomputed:
            self.trainer.ref_model = None

    def step(self, rows: list[dict[str, Any]]) -> torch.Tensor:
        from trl.trainer.callbacks import SyncRefModelCallback

        if self._precomputed:
            rows = [row | {"ref_chosen_logps": -50.0, "ref_rejected_logps": -50.0} for row in rows]
        # Copies: its collator for images writes into the rows.
        loss = self.trainer.training_step(self._model, self.trainer.data_collator([dict(row) for row in rows]))
        self._update()
        if self.trainer.args.sync_ref_model:
            alpha = self.trainer.args.ref_model_mixup_alpha
            SyncRefModelCallback.sync_target_model(self.trainer.model, self.trainer.ref_model, alpha)
        return loss

    def reference_pass(self, rows: list[dict[str, Any]]) -> None:
        inputs = self.trainer._prepare_inputs(self.trainer.data_collator(rows))
        model = self.trainer.ref_model or self.trainer.model
        self.trainer.compute_ref_log_probs(model, inputs)


class PlainSide(Side):
    """The loop one writes by hand: a padded batch, full logits, `log_softmax`, a deep copy as reference."""

    name = "plain"

    def __init__(self, model: Any, device: str):
        self._model, self._reference = model.to(device).train(), copy.deepcopy(model).to(device).eval()
        self._device = device
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    def step(self, rows: list[dict[str, Any]]) -> torch.Tensor:
        policy = self._log_probs(self._model, rows)
        with torch.no_grad():
            reference = self._log_probs(self._reference, rows)
        chosen, rejected = (policy - reference).chunk(2)
        loss = -logsigmoid(BETA * (chosen - rejected)).mean()
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.detach()

    def reference_pass(self, rows: list[dict[str, Any]]) -> None:
        with torch.no_grad():
            self._log_probs(self._reference, rows)

    def _log_probs(self, model: Any, rows: list[dict[str, Any]]) -> torch.Tensor:
        sequences = [row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids") for row in rows]
        starts = torch.tensor([len(row["prompt_ids"]) for row in rows] * 2, device=self._device)
        width = max(len(sequence) for sequence in sequences)
        ids = torch.tensor([sequence + [0] * (width - len(sequence)) for sequence in sequences], device=self._device)
        lengths = torch.tensor([len(sequence) for sequence in sequences], device=self._device)
        place = torch.arange(width, device=self._device)
        mask = (place < lengths[:, None]).long()
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        log_probs = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        responses = (place[1:] >= starts[:, None]) & mask[:, 1:].bool()
        return (log_probs * responses).sum(-1)


def make_side(
    name: str,
    reference: str,
    model: Any,
    tokenizer: Any,
    device: str,
    *,
    batch_size: int,
    rows: list[dict[str, Any]] | None = None,
    adapter: bool = False,
    **options: Any,
) -> Side:
    """A side by its name, with this kind of reference; an adapter is LoRA of rank 16 on all linear layers.

    `rows` is the training set, of which TRL reads only text; in Tether a precomputed reference answers no others.
    An implicit reference always has an adapter; a synchronized one follows the policy after every step.
    """
    if name == "plain":
        return PlainSide(model, device)
    options.setdefault("bf16", device == "cuda")
    if adapter or reference == "implicit":
        from peft import LoraConfig

        options["peft_config"] = LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear")
    if reference == "precomputed":
        options["precompute_ref_log_probs"] = True
    if reference == "synchronized":
        options |= {"sync_ref_model": True, "ref_model_sync_steps": 1}
    if name == "trl":
        texts = rows if rows and "prompt" in rows[0] else None
        return TRLSide(model, tokenizer, device, batch_size=batch_size, rows=texts, **options)
    if name == "tether_bf16":
        options["ref_dtype"] = "bfloat16"
    if reference == "precomputed":
        options["ref_store"] = tempfile.mktemp(suffix=".sqlite")
    return TetherSide(model, tokenizer, device, batch_size=batch_size, rows=rows, **options)


def _options(batch_size: int, device: str, options: dict[str, Any]) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": batch_size,
        "beta": BETA,
        "learning_rate": LEARNING_RATE,
        "logging_steps": 10,
        "max_steps": 100,
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "use_cpu": device == "cpu",
        "max_length": 1024,
        **options,
    }
