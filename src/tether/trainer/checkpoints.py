"""What a checkpoint keeps of a run besides what transformers keeps: the reference, the tokens seen, BCO's mean.

Knows files and references; knows no trainer.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tether.distributed import raising_together
from tether.errors import ResumeError
from tether.losses.weighting import RewardShift
from tether.reference import Reference
from tether.reference.probing import RunProbes
from tether.reference.watch import ReferenceWatch, Start

if TYPE_CHECKING:
    from tether.config.dpo_config import DPOConfig

logger = logging.getLogger(__name__)

_FOLDER, _IDENTITY, _PROGRESS, _SHIFT = "reference", "identity.json", "progress.json", "reward_shift.json"
_START = "start.json"


@dataclass
class StreamPlace:
    """How far a run is in its stream; transformers takes all passes over a stream for one.

    Attributes:
        num_passes: Passes that are over.
        num_steps: Optimizer steps of the pass that is under way.
    """

    num_passes: int = 0
    num_steps: int = 0

    def take_step(self, *, ends_pass: bool) -> None:
        """Counts an optimizer step."""
        self.num_passes += ends_pass
        self.num_steps = 0 if ends_pass else self.num_steps + 1


class Kept(NamedTuple):
    """What of a run has a state of its own.

    Attributes:
        reference: The reference.
        watch: What it said of a few fixed pairs at the start.
        probes: What it answers to texts that are no rows.
        reward_shift: BCO's running mean of rewards, where a loss keeps one.
    """

    reference: Reference
    watch: ReferenceWatch
    probes: RunProbes
    reward_shift: RewardShift | None


def save_run(checkpoint: Path, kept: Kept, num_tokens: float, place: StreamPlace | None, *, writes: bool) -> None:
    """Writes everything that a checkpoint keeps besides what transformers keeps. Every process calls it.

    Args:
        checkpoint: The folder.
        kept: What has a state of its own.
        num_tokens: Tokens trained on so far, by all processes.
        place: How far the run is in a stream; None for a set.
        writes: Whether this process writes.
    """
    save_reference(checkpoint, kept.reference, num_tokens, place=place, writes=writes)
    kept.probes.save(checkpoint / _FOLDER if writes else None)
    if writes:
        _save_reward_shift(checkpoint, kept.reward_shift)
        _save_start(checkpoint, kept.watch.start)


def load_run(checkpoint: Path, kept: Kept) -> int:
    """Restores it, and returns the tokens trained on. Every process calls it.

    Raises:
        ResumeError: If the checkpoint is of a run against another reference, or lacks a part.
    """
    num_tokens = load_reference(checkpoint, kept.reference)
    with raising_together():
        kept.probes.check(checkpoint / _FOLDER)
    _load_reward_shift(checkpoint, kept.reward_shift)
    kept.watch.start = _load_start(checkpoint)
    return num_tokens


def load_companions(checkpoint: Path, kept: Kept) -> None:
    """Restores what belongs to the weights of a checkpoint that was chosen later: figures of it are of these.

    Every process calls it. A reference that stands still has nothing to restore.
    """
    if kept.reference.traits.moves:
        load_reference(checkpoint, kept.reference)
    _load_reward_shift(checkpoint, kept.reward_shift)


def load_place(checkpoint: Path) -> StreamPlace:
    """Where the run of a checkpoint was in its stream.

    Raises:
        ResumeError: If the checkpoint does not say.
    """
    path = checkpoint / _PROGRESS
    if not path.is_file():  # nor does it have a reference, which is refused where that is loaded
        return StreamPlace()
    saved = json.loads(path.read_text()).get("stream")
    if saved is None:
        raise ResumeError(
            problem=f"Cannot resume from {checkpoint} with a stream: it does not say how far its run had read one.",
            details="Which rows come next depends on how many passes and steps that run had finished.",
            instead="Resume with the dataset that its run was trained on, or start a new run.",
        )
    return StreamPlace(**saved)


def save_reference(
    checkpoint: Path,
    reference: Reference,
    num_tokens: float,
    *,
    place: StreamPlace | None = None,
    writes: bool = True,
) -> None:
    """Writes the reference's identity and state (`checkpoint/reference/`), the tokens trained on, and the place in a
    stream.

    Every process calls it, because a sharded state is gathered; the one with `writes` writes.
    """
    if not writes:
        reference.save(None)
        return
    folder = checkpoint / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _IDENTITY).write_text(json.dumps(reference.identity.describe(), indent=2))
    progress = {"num_tokens": num_tokens} | ({} if place is None else {"stream": asdict(place)})
    (checkpoint / _PROGRESS).write_text(json.dumps(progress))
    reference.save(folder)


def load_reference(checkpoint: Path, reference: Reference) -> int:
    """Restores the reference's state and returns the tokens trained on.

    Raises:
        ResumeError: On every process, if on any of them the checkpoint lacks a part of it.
    """
    with raising_together():
        reference.load(checkpoint / _FOLDER)
    path = checkpoint / _PROGRESS
    return int(json.loads(path.read_text())["num_tokens"]) if path.is_file() else 0  # of another library


def warn_of_weights_alone(args: DPOConfig) -> None:
    """Says what checkpoints of weights alone lose when the reference moves."""
    if args.save_only_model and args.save_strategy != "no":
        logger.warning(
            "With `save_only_model=True` and `sync_ref_model=True`, checkpoints do not hold the reference: you cannot "
            "resume from them, and its average is lost. `trainer.export_reference(folder)` saves the last one."
        )


def warn_of_no_sync(args: DPOConfig, num_steps: int) -> None:
    """Says when a run ends before its first sync."""
    if args.sync_ref_model and args.ref_model_sync_steps > num_steps:
        logger.warning(
            f"`sync_ref_model=True` will not move the reference: the first sync comes after "
            f"{args.ref_model_sync_steps} optimizer steps, and this run has {num_steps}. Lower `ref_model_sync_steps`."
        )


def _save_reward_shift(checkpoint: Path, shift: RewardShift | None) -> None:
    """Writes BCO's running mean of rewards, where a run keeps one."""
    if shift is not None:
        (checkpoint / _SHIFT).write_text(json.dumps({"sum_and_count": shift.state()}))


def _load_reward_shift(checkpoint: Path, shift: RewardShift | None) -> None:
    """Restores it; double precision as decimal text comes back bit for bit.

    Raises:
        ResumeError: If the checkpoint's run kept none.
    """
    if shift is None:
        return
    path = checkpoint / _SHIFT
    if not path.is_file():
        raise ResumeError(
            problem=f"Cannot resume from {checkpoint} with `bco_pair`: the checkpoint does not hold a running mean of "
            "rewards to go on from.",
            instead="Set `bco_reward_shift=False`, use the losses of the checkpoint's run, or start a new run.",
        )
    shift.load(json.loads(path.read_text())["sum_and_count"])


def _save_start(checkpoint: Path, start: Start | None) -> None:
    """Writes what the initial policy said of the fixed pairs, where a reference that moves is compared with it."""
    if start is not None:
        (checkpoint / _FOLDER / _START).write_text(json.dumps(start._asdict()))


def _load_start(checkpoint: Path) -> Start | None:
    """Reads it, if the checkpoint has it; fp32 as decimal text comes back bit for bit."""
    path = checkpoint / _FOLDER / _START
    return Start(**json.loads(path.read_text())) if path.is_file() else None


def check_reference(checkpoint: Path, reference: Reference, *, is_proven: bool = True) -> None:
    """Compares the reference with the one that a checkpoint's run was trained against.

    Args:
        checkpoint: The folder.
        reference: The reference of this run.
        is_proven: Whether the checkpoint has a manifest; another library's names no reference.

    Raises:
        ResumeError: If it was another, or the checkpoint does not say which.
    """
    path = checkpoint / _FOLDER / _IDENTITY
    if not path.is_file() and not is_proven and not reference.traits.moves:
        logger.warning(f"{checkpoint} does not name its run's reference; this run goes on with its own.")
        return
    if not path.is_file():
        raise ResumeError(
            problem=f"Cannot resume from {checkpoint}: it does not say which reference its run was trained against.",
            instead="Resume from a checkpoint that Tether wrote without `save_only_model=True`. Or start a new run "
            f"from its weights, `DPOTrainer({str(checkpoint)!r}, ref_model=...)`, with the model that its run began "
            "with as `ref_model`.",
        )
    saved, own = json.loads(path.read_text()), reference.identity.describe()
    if saved.get("kind") in _FORMER_KINDS:
        raise ResumeError(
            problem=f"Cannot resume from {checkpoint}: it was written by Tether 0.1.0, whose references had "
            "other names.",
            details=f"It calls its reference {saved['kind']!r}.",
            instead="Go on with Tether 0.1.0, or start a new run.",
        )
    if all(saved.get(name) == own[name] for name in ("kind", "weights", "compute_dtype", "scoring_version")):
        return
    differing = [name for name in _REMEDIES if saved.get(name) != own[name]]
    differing = [name for name in differing if name != "weights" or not set(differing) & _PARTS.keys()]
    if "kind" in differing:  # one of the two may have no model, and is of no version
        differing = [name for name in differing if name == "adapter" or (saved.get(name) and own[name])]
    raise ResumeError(
        problem=f"Cannot resume from {checkpoint}: its run was trained against another reference.",
        details=" ".join(
            [*(_difference(name, saved, own) for name in differing), _what_is_alike(differing, own)]
        ).strip(),
        instead=" ".join([*(_REMEDIES[name] for name in differing), "Or start a new run."]),
    )


_FORMER_KINDS = ("frozen", "adapter", "moving", "following", "uniform")
# In the order in which they are best mended: the parts of an identity, and how to give the right one.
_REMEDIES = {
    "scoring_version": "Resume with the version of Tether that wrote the checkpoint.",
    "kind": "Use that run's options for the reference (`reference_free`, `sync_ref_model`, `ref_model`, an adapter or "
    "none).",
    "compute_dtype": "Use that run's dtypes: the model's own, `bf16` or `fp16`, `tf32`, and `ref_dtype`.",
    "base": "Build the trainer with the weights that the run began with, and with its `ref_model` if it had one. Do "
    "not use the checkpoint's own weights, which `train(resume_from_checkpoint=...)` loads by itself, or a folder that "
    "has changed since.",
    "config": "Load the model with the config that the run began with (rotary base, norms, windows, ...).",
    "weights": "Use the reference that the run began with: the same columns `ref_chosen_logps` and "
    "`ref_rejected_logps`, or a reference of the same name.",
    "adapter": "Use the adapter that the run began with, not the checkpoint's: the same `peft_config` for a fresh "
    "adapter, the same adapter folder for a continued one.",
}
_PARTS = {"base": "the base weights", "config": "the model's config", "adapter": "the adapter"}


def _difference(name: str, saved: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    there, here = saved.get(name), own[name]
    if name not in _PARTS:
        return f"Its `{name}` was {there} and is {here} in this trainer."
    if name == "adapter":
        there, here = (value or "none (the base alone)" for value in (there, here))
    what = _PARTS[name].capitalize()
    return f"{what} {'differ' if name == 'base' else 'differs'}: {there} in the checkpoint, {here} in this trainer."


def _what_is_alike(differing: list[str], own: Mapping[str, Any]) -> str:
    alike = [what for part, what in _PARTS.items() if part not in differing and own[part]]
    return f"The same in both: {', '.join(alike)}." if alike else ""
