"""The sides of every comparison, on the same rows and weights: Tether, TRL, a hand-written loop, bare products."""

from __future__ import annotations

import copy
import itertools
import logging
import os
import tempfile
import warnings
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from datasets import Dataset
from torch.nn.functional import logsigmoid
from torch.utils._python_dispatch import TorchDispatchMode

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

    def num_fed(self, rows: list[dict[str, Any]]) -> int:
        """How many tokens its forward is given for some rows."""
        from tether import score

        batch = self.trainer._prepare_inputs(self.trainer.data_collator(rows))["batch"]
        with torch.no_grad(), _Embedded() as embedded:
            score(self.trainer.model, batch)
        return embedded.num


class _Embedded(TorchDispatchMode):
    """Counts the tokens of the last look-up in an embedding."""

    num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.embedding.default:
            self.num = args[1].numel()
        return func(*args, **(kwargs or {}))


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


class LimitSide(Side):
    """The matrix products of a step alone, of the same shapes in the same order, and the optimizer.

    Nothing is computed element by element and nothing is learned. Of attention, the causal half.

    Args:
        model: A model of Llama's kind, with an adapter where the reference is implicit.
        reference: `explicit` makes a pass of its own over a copy, `implicit` over the base, `precomputed` none.
        num_fed: How many tokens a forward is given for some rows.
    """

    name = "limit"

    def __init__(self, model: Any, reference: str, num_fed: Callable[[list[dict[str, Any]]], int]):
        self._policy = _weights_of(model.train())
        layers, head = _weights_of(copy.deepcopy(model)) if reference == "explicit" else self._policy
        if reference == "implicit":
            layers = [[weight for weight in layer if not weight.requires_grad] for layer in layers]
        self._reference = None if reference == "precomputed" else (layers, head)
        self._num_fed, self._config = num_fed, model.config
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        self._optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)
        self._made: dict[Any, torch.Tensor] = {}

    @torch.no_grad()
    def step(self, rows: list[dict[str, Any]]) -> torch.Tensor:
        answers = [(len(row["prompt_ids"]), len(row[side])) for row in rows for side in ("chosen_ids", "rejected_ids")]
        queries = [(0, len(row["prompt_ids"])) for row in rows] + answers
        num, num_scored = self._num_fed(rows), sum(length for _, length in answers)
        for layers, head in filter(None, (self._reference, self._policy)):
            for layer in layers:
                for weight in layer:
                    self._some(weight, num, weight.shape[1]) @ weight.T
                self._attend(queries, head, times=2)
            for tile in head.split(2**20 // num_scored):
                self._some(tile, num_scored, tile.shape[1]) @ tile.T
        layers, head = self._policy
        self._backward(head, num_scored, 2**20 // num_scored)
        for layer in reversed(layers):
            self._attend(queries, head, times=5)
            for weight in reversed(layer):
                self._backward(weight, num, len(weight))
        self._optimizer.step()
        return torch.zeros(())

    def _backward(self, weight: Any, num: int, at_once: int) -> None:
        grads = weight.grad.split(at_once) if weight.requires_grad else itertools.repeat(None)
        for tile, grad in zip(weight.split(at_once), grads, strict=False):
            upstream = self._some(tile, num, len(tile))
            upstream @ tile
            if grad is not None:
                torch.mm(upstream.T, self._some(tile, num, tile.shape[1]), out=grad)

    def _attend(self, queries: list[tuple[int, int]], like: torch.Tensor, *, times: int) -> None:
        heads = self._config.num_attention_heads
        size = self._config.hidden_size // heads
        for before, num in queries:
            keys = self._some(like, heads, size, before + (num + 1) // 2)
            for _ in range(times):
                self._some(like, heads, num, size) @ keys

    def _some(self, like: torch.Tensor, *shape: int) -> torch.Tensor:
        """The same random numbers for a shape each time."""
        key = like.dtype, shape
        if key not in self._made:
            self._made[key] = torch.randn(shape, dtype=like.dtype)
        return self._made[key]


def _weights_of(model: Any) -> tuple[list[list[Any]], Any]:
    """The weights of each layer's products, those of adapters too, in their order; and the head's."""
    layers = (model.get_base_model() if hasattr(model, "peft_config") else model).model.layers
    linear = [[part.weight for part in layer.modules() if isinstance(part, torch.nn.Linear)] for layer in layers]
    return linear, model.get_output_embeddings().weight


def lora() -> Any:
    """LoRA of rank 16 on all linear layers."""
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear")


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
    """A side by its name, with this kind of reference; `implicit` puts an adapter (`lora`) on the model.

    `rows` is the training set, of which TRL reads only text; in Tether a precomputed reference answers no others.
    An implicit reference always has an adapter; a synchronized one follows the policy after every step.
    """
    if name == "plain":
        return PlainSide(model, device)
    options.setdefault("bf16", device == "cuda" or model.dtype == torch.bfloat16)
    if adapter or reference == "implicit":
        options["peft_config"] = lora()
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
