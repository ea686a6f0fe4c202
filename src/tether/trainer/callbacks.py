"""`BEMACallback`: the bias-corrected average of the policy's weights, kept beside training; and TRL's name for a sync.

Knows the schedule and what of it belongs into a checkpoint; the arithmetic is `reference.averaging.bema`.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from tether.distributed import is_sharded
from tether.errors import ConfigurationError, ResumeError
from tether.models.finite import check_weights
from tether.reference.bema import BemaReference
from tether.reference.twin import frozen_twin
from tether.reference.updates.averaging import BemaSchedule, bema
from tether.trainer.manifest import MANIFEST

logger = logging.getLogger(__name__)

_STATE, _FOLDER = "bema.safetensors", "bema"


class BEMACallback(TrainerCallback):
    """Keeps a bias-corrected exponential moving average of the weights that train, and saves it at the end.

    `EMA_t = (1 - b_t) EMA_{t-1} + b_t theta_t` and `BEMA_t = EMA_t + a_t (theta_t - theta_0)`, with
    `b_t = (rho + gamma t)^-kappa`, `a_t = (rho + gamma t)^-eta` and `t` the optimizer step.

    Block and Zhang 2025, arXiv 2508.00180. Arguments, attributes and schedule are those of TRL's callback; here it
    also takes models of which only a part trains (adapters), keeps its averages in fp32, and is resumed with the
    checkpoint. It works with any `transformers.Trainer`; the average is written to `output_dir/bema`.

    Args:
        update_freq: Optimizer steps between updates (`phi`).
        ema_power: `kappa`; 0 for no average.
        bias_power: `eta`; a large value for no correction.
        lag: `rho`.
        update_after: Steps before the average begins (`tau`); `theta_0` is taken then.
        multiplier: `gamma`.
        min_ema_multiplier: Smallest `b_t`.
        device: Where the averages are kept.
        update_ref_model: With `DPOTrainer`: the reference takes the average's weights.
        ref_model_update_freq: Optimizer steps between two times that it does.
        ref_model_update_after: Steps before the first.

    Raises:
        ConfigurationError: For a schedule that does not count steps; when training begins, for sharded weights.
        ResumeError: When a run is resumed from a checkpoint without the average.

    Example:
        >>> trainer = DPOTrainer(model, args=args, train_dataset=pairs,
        ...                      callbacks=[BEMACallback(update_freq=100)])   # doctest: +SKIP
    """

    def __init__(
        self,
        update_freq: int = 400,
        ema_power: float = 0.5,
        bias_power: float = 0.2,
        lag: int = 10,
        update_after: int = 0,
        multiplier: float = 1.0,
        min_ema_multiplier: float = 0.0,
        device: str = "cpu",
        update_ref_model: bool = False,
        ref_model_update_freq: int = 400,
        ref_model_update_after: int = 0,
    ) -> None:
        for name, every in (("update_freq", update_freq), ("ref_model_update_freq", ref_model_update_freq)):
            if every < 1:
                raise ConfigurationError(
                    problem=f"Cannot use `BEMACallback({name}={every})`: it is the number of optimizer steps between "
                    "updates, so it must be at least 1.",
                    instead=f"Set `{name}` to a whole number of at least 1.",
                )
        self.update_freq, self.update_after = update_freq, update_after
        self.ema_power, self.bias_power = ema_power, bias_power
        self.lag, self.multiplier, self.min_ema_multiplier = lag, multiplier, min_ema_multiplier
        self.device = device
        self.update_ref_model = update_ref_model
        self.ref_model_update_freq, self.ref_model_update_after = ref_model_update_freq, ref_model_update_after
        self.param_names: list[str] = []
        self.thetat_params: list[nn.Parameter] = []
        self.theta0_params: list[Tensor] = []
        self.ema_params: list[Tensor] = []
        self._bema_params: list[Tensor] = []
        self._policy: nn.Module | None = None
        self._running_model: nn.Module | None = None
        self._resumed_from: Path | None = None
        self._reference: BemaReference | None = None

    # ---- what others ask and tell --------------------------------------------------------------------------------

    @property
    def options(self) -> dict[str, Any]:
        """What the average depends on, to be compared when a run is resumed."""
        names = inspect.signature(type(self)).parameters
        return {name: getattr(self, name) for name in names if name != "device" and hasattr(self, name)}

    @property
    def running_model(self) -> nn.Module | None:
        """A model with the averaged weights, made when first asked for; None before training."""
        if self._running_model is None and self._policy is not None:
            self._running_model = frozen_twin(self._policy, lambda p: p.requires_grad, device=torch.device(self.device))
            self._write_running_model()
        return self._running_model

    def follow_with(self, reference: BemaReference) -> None:
        """Names the reference that takes the average's weights."""
        self._reference = reference

    def save(self, checkpoint: Path) -> None:
        """Writes the averages beside the weights of a checkpoint."""
        parts = zip(("initial", "average", "corrected"), self._averages(), strict=True)
        tensors = {f"{part}.{name}": t for part, ts in parts for name, t in zip(self.param_names, ts, strict=True)}
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, checkpoint / _STATE)

    def resume_from(self, checkpoint: Path) -> None:
        """Names the checkpoint that training is resumed from."""
        self._resumed_from = checkpoint

    # ---- events of training --------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._check_reference()
        self._policy = model.module if isinstance(getattr(model, "module", None), nn.Module) else model
        assert self._policy is not None
        trained = {name: p for name, p in self._policy.named_parameters() if p.requires_grad}
        _refuse_shards(trained)
        self.param_names, self.thetat_params = list(trained), list(trained.values())
        self.theta0_params, self.ema_params, self._bema_params = (self._snapshot() for _ in range(3))
        self._running_model = None
        if state.global_step:
            self._load(self._resumed_from or Path(args.output_dir) / f"checkpoint-{state.global_step}")
        self._resumed_from = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        age = state.global_step - self.update_after
        if self._policy is not None and age >= 0 and age % self.update_freq == 0:
            check_weights(self._policy, "average the policy", state.global_step)
        if age == 0:
            self.theta0_params, self.ema_params = self._snapshot(), self._snapshot()
        elif age > 0 and age % self.update_freq == 0:
            self._update(state.global_step)
        age = state.global_step - self.ref_model_update_after
        if self._reference is not None and age >= 0 and age % self.ref_model_update_freq == 0:
            self._reference.take(dict(zip(self.param_names, self._bema_params, strict=True)))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes the averages into the checkpoint of another trainer; `DPOTrainer` has, before it was whole."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if not state.is_world_process_zero or args.save_only_model or (folder / MANIFEST).is_file():
            return
        if folder.is_dir():
            self.save(folder)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / _FOLDER
        policy: Any = self._policy
        with self._averaged_policy():
            policy.save_pretrained(folder)
        logger.info("The averaged model was saved to %s", folder)

    # ---- the average ---------------------------------------------------------------------------------------------

    def _snapshot(self) -> list[Tensor]:
        return [p.detach().to(self.device, torch.float32, copy=True) for p in self.thetat_params]

    def _averages(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        return self.theta0_params, self.ema_params, self._bema_params

    @torch.no_grad()
    def _update(self, step: int) -> None:
        schedule = BemaSchedule(
            ema_power=self.ema_power,
            bias_power=self.bias_power,
            multiplier=self.multiplier,
            lag=self.lag,
            min_ema_weight=self.min_ema_multiplier,
        )
        for index, theta in enumerate(self.thetat_params):
            self.ema_params[index], self._bema_params[index] = bema(
                self.ema_params[index],
                theta.detach().to(self.device, torch.float32),
                self.theta0_params[index],
                step,
                schedule,
            )
        if self._running_model is not None:
            self._write_running_model()

    def _write_running_model(self) -> None:
        assert self._running_model is not None
        own = dict(self._running_model.named_parameters())
        for name, weight in zip(self.param_names, self._bema_params, strict=True):
            own[name].data.copy_(weight)

    @contextmanager
    def _averaged_policy(self) -> Iterator[None]:
        """While open, the policy holds the averaged weights, by pointer."""
        trained = [p.data for p in self.thetat_params]
        try:
            for parameter, weight in zip(self.thetat_params, self._bema_params, strict=True):
                parameter.data = weight.to(parameter.device, parameter.dtype)
            yield
        finally:
            for parameter, data in zip(self.thetat_params, trained, strict=True):
                parameter.data = data

    def _load(self, checkpoint: Path) -> None:
        path = checkpoint / _STATE
        if not path.is_file():
            raise ResumeError(
                problem=f"Cannot resume from {checkpoint} with `BEMACallback`: the checkpoint does not hold the "
                "average that its run had reached.",
                details="An average that starts here would differ from that of an uninterrupted run.",
                instead="Resume from a checkpoint of a run with this callback, or leave the callback out.",
            )
        saved = load_file(path, device=self.device)
        for part, tensors in zip(("initial", "average", "corrected"), self._averages(), strict=True):
            tensors[:] = [saved[f"{part}.{name}"] for name in self.param_names]

    def _check_reference(self) -> None:
        if self.update_ref_model and self._reference is None:
            raise ConfigurationError(
                problem="Cannot use `BEMACallback(update_ref_model=True)` without a reference to update: only a "
                "`tether.DPOTrainer` that gets the callback at construction builds a reference that can be updated.",
                instead="Pass the callback in `DPOTrainer(..., callbacks=[...])`, or set `update_ref_model=False`.",
            )


class SyncRefModelCallback(TrainerCallback):
    """The synchronized reference (TR-DPO) as TRL's callback has it, for scripts that name it.

    `DPOConfig(sync_ref_model=True)` alone moves the reference, every `ref_model_sync_steps` optimizer steps, and saves
    it with each checkpoint. With that option the callback may be there and adds nothing.

    Args:
        ref_model: Unused: the reference that moves is the trainer's.
        accelerator: Unused.

    Raises:
        ConfigurationError: In a run without `sync_ref_model=True`.
    """

    def __init__(self, ref_model: Any = None, accelerator: Any = None) -> None:
        self.ref_model, self.accelerator = ref_model, accelerator

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not getattr(args, "sync_ref_model", False):
            raise ConfigurationError(
                problem="Cannot use `SyncRefModelCallback` without `sync_ref_model=True`: a reference that moves is "
                "built as one, watched as one and saved with every checkpoint.",
                instead="Write `DPOConfig(sync_ref_model=True, ref_model_sync_steps=..., ref_model_mixup_alpha=...)`, "
                "and leave the callback out.",
            )

    on_train_begin = on_init_end  # it may be added after construction


def _refuse_shards(parameters: dict[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        if parameter.numel() == 0 or is_sharded(parameter):
            raise ConfigurationError(
                problem=f"Cannot use `BEMACallback` with sharded weights: this process holds only a part of `{name}`, "
                "so it can neither average nor save it.",
                instead="Train without sharding (DDP), or average the saved checkpoints afterwards.",
            )
