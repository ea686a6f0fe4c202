"""`tether train`: a recipe in, a trained policy out."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tether.cli import EXIT_DONE, EXIT_INTERRUPTED
from tether.cli.assemble import build_trainer
from tether.cli.dry_run import describe_dry_run
from tether.cli.interrupt import StopOnInterrupt
from tether.cli.launch import typed_words
from tether.cli.library_errors import report_library_errors
from tether.cli.pairs import is_file
from tether.cli.progress import ProgressLines
from tether.cli.recipe import Recipe, Request, make_recipe
from tether.cli.summary import describe_end, describe_start
from tether.distributed import of_main
from tether.errors import MissingLogProbsError
from tether.masking import without_secrets
from tether.trainer.dpo_trainer import DPOTrainer
from tether.trainer.resuming import named_checkpoint
from tether.trainer.run_folder import check_free, last_checkpoint, read_last_run, whole_checkpoints


def run(request: Request) -> int:
    recipe = make_recipe(request)
    checkpoint = _checkpoint_to_resume(recipe)
    if recipe.script.dry_run:
        with report_library_errors("tether train"):
            print(describe_dry_run(recipe), flush=True)
        return EXIT_DONE
    if recipe.config.process_index == 0 and not recipe.config.take_over:
        check_free(Path(str(recipe.config.output_dir)))  # before anything is loaded; training looks again
    stop, progress = StopOnInterrupt(), ProgressLines()
    try:
        with report_library_errors("tether train"):
            trainer = build_trainer(recipe, [progress, stop])
    except MissingLogProbsError as error:  # `ref_store_mode: require`
        raise MissingLogProbsError(
            error.problem,
            instead=f"Score what is missing: `tether precompute {shlex.join(request.words)}`.",
            details=error.details,
        ) from error
    _print(trainer, describe_start(trainer, recipe) + _checkpoints_note(trainer, checkpoint))
    started = time.perf_counter()
    try:
        with stop, report_library_errors("tether train", lambda: not progress.has_begun):
            trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        stop.stopped = True
    if stop.stopped:
        _print(trainer, _how_to_resume(trainer, recipe, request.words))
        return EXIT_INTERRUPTED
    if checkpoint and of_main(_is_saved(trainer, Path(checkpoint))):
        _print(trainer, f"done       the model of step {trainer.state.global_step} is in {trainer.args.output_dir}")
        return EXIT_DONE
    seconds = time.perf_counter() - started
    trainer.save_model()
    trainer.save_state()
    metrics = _held_out_metrics(trainer)
    if trainer.args.push_to_hub:
        trainer.push_to_hub(dataset_name=_hub_data(recipe))
    _print(trainer, describe_end(trainer, metrics, seconds, progress.tokens_per_second))
    return EXIT_DONE


def _checkpoint_to_resume(recipe: Recipe) -> str | None:
    wanted = recipe.script.resume
    if wanted is None:
        return None
    return str(named_checkpoint(Path(str(recipe.config.output_dir)), wanted.lower() == "true" or wanted))


def _is_saved(trainer: DPOTrainer, checkpoint: Path) -> bool:
    """Whether the run's model is that of the checkpoint, with all its files, and no step was taken since."""
    folder = Path(str(trainer.args.output_dir))
    last, names = read_last_run(folder), [path.name for path in checkpoint.glob("*model*.safetensors")]
    is_whole = bool(names) and all((folder / name).is_file() for name in names)
    return is_whole and last is not None and last.saved_step == trainer.state.global_step


def _hub_data(recipe: Recipe) -> str | None:
    """The name on the hub of the pairs, for the model card; None for a file, a folder or a mixture."""
    name = recipe.script.train_data
    return None if name is None or is_file(name) or Path(name).expanduser().is_dir() else name.partition(":")[0]


def _checkpoints_note(trainer: DPOTrainer, checkpoint: str | None) -> str:
    """Which checkpoint is resumed, or a note on those that this run may replace; empty if there are none."""
    if checkpoint is not None:
        return f"\nresuming   {checkpoint}"
    earlier = [*whole_checkpoints(Path(str(trainer.args.output_dir)))]
    if not earlier:
        return ""
    how = f"(to continue it: --resume {earlier[-1]})"
    return f"\nnote       {earlier[-1]} is there from an earlier run; this run starts over {how}"


def _held_out_metrics(trainer: DPOTrainer) -> dict[str, float]:
    """The last evaluation if it is of the weights that were saved; otherwise a new one."""
    if trainer.eval_dataset is None:
        return {}
    last = next((entry for entry in reversed(trainer.state.log_history) if "eval_loss" in entry), None)
    if last and last["step"] == trainer.state.global_step and not trainer.args.load_best_model_at_end:
        return last
    return trainer.evaluate()


def _how_to_resume(trainer: DPOTrainer, recipe: Recipe, given: Sequence[str]) -> str:
    where = f"\ntether: stopped after step {trainer.state.global_step} of {trainer.state.max_steps}."
    checkpoint = last_checkpoint(str(trainer.args.output_dir))
    if checkpoint is None or trainer.args.save_only_model:
        return f"{where} There is no checkpoint to resume from."
    asked = recipe.script.resume
    words = typed_words(given)
    if asked is None or asked.lower() != "true":
        words += ["--resume"] if asked is None else ["--resume", checkpoint]
    command = without_secrets(f"tether train {shlex.join(words)}")
    return f"{where} The last checkpoint is {checkpoint}. To resume:\n  {command}"


def _print(trainer: DPOTrainer, text: str) -> None:
    if trainer.is_world_process_zero():
        print(text, flush=True)
    sys.stdout.flush()
