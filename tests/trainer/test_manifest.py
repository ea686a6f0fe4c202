"""A checkpoint is whole and proven: what does not fit its manifest is refused by name, and nothing else is read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback
from xxhash import xxh3_64_hexdigest

from support.observe import bits, same_bits
from support.runs import make_trainer, trained
from support.tiny import tiny_pairs
from tether import BEMACallback, DPOTrainer
from tether.errors import ResumeError
from tether.trainer.manifest import MANIFEST, check_files, listed_alone, read_manifest, whole_manifest

RUN: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
FOLLOWS: dict[str, Any] = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.3}


def files_of(checkpoint: Path) -> dict[str, Path]:
    return {str(path.relative_to(checkpoint)): path for path in checkpoint.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a run whose reference moves, and of a second one in `other`."""
    folder = tmp_path_factory.mktemp("kept")
    trained(folder, **RUN, **FOLLOWS, callbacks=[BEMACallback(update_freq=1)])
    trained(folder / "other", **RUN, **FOLLOWS, callbacks=[BEMACallback(update_freq=1)], seed=3)
    return folder


def test_a_manifest_lists_every_file_with_its_bytes_and_checksum_and_is_written_last(kept: Path) -> None:
    checkpoint = kept / "checkpoint-2"
    manifest = read_manifest(checkpoint)
    assert manifest is not None and manifest.step == 2
    files = files_of(checkpoint)
    written_at = files.pop(MANIFEST).stat().st_mtime_ns
    assert {name: tuple(entry) for name, entry in manifest.files.items()} == {
        name: (path.stat().st_size, xxh3_64_hexdigest(path.read_bytes())) for name, path in files.items()
    }
    assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "bema.safetensors"} <= files.keys()
    assert all(path.stat().st_mtime_ns <= written_at for path in files.values())


def flipped(path: Path, _: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def zeroed(path: Path, _: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-8] + bytes(8))


HARMS: dict[str, Callable[[Path, Path], object]] = {
    "a flipped bit": flipped,
    "zeros": zeroed,
    "cut": lambda path, _: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path, _: os.truncate(path, 0),
    "deleted": lambda path, _: path.unlink(),
    "of another step": lambda path, kept: shutil.copy(kept / "checkpoint-2" / path.name, path),
    "of another run": lambda path, kept: shutil.copy(kept / "other" / "checkpoint-4" / path.name, path),
}


@pytest.mark.parametrize("harm", HARMS)
def test_every_damaged_file_is_named(harm: str, kept: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-4"
    shutil.copytree(kept / "checkpoint-4", checkpoint)
    manifest = read_manifest(checkpoint)
    assert manifest is not None
    harmed = 0
    for name, path in files_of(checkpoint).items():
        before = path.read_bytes()
        if harm.startswith("of another") and ("/" in name or name == MANIFEST):
            continue
        HARMS[harm](path, kept)
        if path.exists() and path.read_bytes() == before:
            continue  # such as a config that all steps share
        harmed += 1
        if name == MANIFEST:
            assert whole_manifest(checkpoint) is None
        else:
            with pytest.raises(ResumeError, match=f"`{name}` "):
                check_files(checkpoint, manifest)
        path.write_bytes(before)
    assert harmed >= 4
    check_files(checkpoint, manifest)


@pytest.mark.parametrize(
    ("change", "says"),
    [({"step": 3}, "is damaged"), ({"checksum": "0"}, "is damaged"), ({"version": 2}, "is of version 2")],
)
def test_a_manifest_that_was_changed_is_refused(change: dict[str, Any], says: str, kept: Path, tmp_path: Path) -> None:
    shutil.copytree(kept / "checkpoint-4", tmp_path / "checkpoint-4")
    path = tmp_path / "checkpoint-4" / MANIFEST
    fields = json.loads(path.read_text()) | change
    if "version" in change:  # as a later Tether would write it
        rest = {name: value for name, value in fields.items() if name != "checksum"}
        fields["checksum"] = xxh3_64_hexdigest(json.dumps(rest, sort_keys=True).encode())
    path.write_text(json.dumps(fields))
    with pytest.raises(ResumeError, match=says):
        make_trainer(tmp_path, **RUN, **FOLLOWS).train(str(tmp_path / "checkpoint-4"))


def test_a_manifest_that_leads_out_of_its_folder_is_refused(kept: Path, tmp_path: Path) -> None:
    shutil.copytree(kept / "checkpoint-4", tmp_path / "checkpoint-4")
    path = tmp_path / "checkpoint-4" / MANIFEST
    fields = json.loads(path.read_text())
    del fields["checksum"]
    fields["files"]["../../elsewhere"] = [0, ""]
    path.write_text(json.dumps(fields | {"checksum": xxh3_64_hexdigest(json.dumps(fields, sort_keys=True).encode())}))
    with pytest.raises(ResumeError, match="is damaged"):
        read_manifest(tmp_path / "checkpoint-4")


def test_what_a_manifest_does_not_list_is_left_alone_and_unread(tmp_path: Path) -> None:
    whole = trained(tmp_path, **RUN, **FOLLOWS)
    checkpoint = tmp_path / "checkpoint-2"
    for name in ("scaler.pt", "pytorch_model_fsdp.bin", "reward_shift.json", "notes.txt"):  # libraries look for these
        (checkpoint / name).write_text("not theirs")
    resumed = make_trainer(tmp_path, **RUN, **FOLLOWS)
    resumed.train(str(checkpoint))
    assert same_bits(bits(resumed.model), bits(whole.model))
    assert (checkpoint / "scaler.pt").read_text() == "not theirs"


def test_an_error_about_a_checkpoint_names_it_and_not_where_its_files_are_read(kept: Path) -> None:
    manifest = read_manifest(kept / "checkpoint-4")
    (kept / "checkpoint-4" / "notes.txt").write_text("")
    with pytest.raises(ResumeError) as caught, listed_alone(kept / "checkpoint-4", manifest) as view:
        raise ResumeError(problem=f"Cannot resume from {view}.", instead=f"Not {view}.")
    assert str(caught.value) == f"Cannot resume from {kept / 'checkpoint-4'}.\n  Not {kept / 'checkpoint-4'}."
    assert view != kept / "checkpoint-4" and not view.exists()


class SeenAtSave(TrainerCallback):
    """The folders that were whole when callbacks heard of a save."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        manifest = whole_manifest(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        self.steps += [] if manifest is None else [manifest.step]


def test_callbacks_see_a_checkpoint_whole_and_in_its_place(tmp_path: Path) -> None:
    seen = SeenAtSave()
    trained(tmp_path, **RUN, callbacks=[seen])
    assert seen.steps == [2, 4]
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"checkpoint-2", "checkpoint-4"}


def test_the_best_checkpoint_is_named_by_its_place(tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss", "save_total_limit": 1}
    trainer = trained(tmp_path, **RUN, **options, eval_dataset=tiny_pairs(4, seed=1))
    best = str(tmp_path / f"checkpoint-{trainer.state.best_global_step}")
    assert trainer.state.best_model_checkpoint == best
    assert json.loads((Path(best) / "trainer_state.json").read_text())["best_model_checkpoint"] == best


def test_a_save_that_fails_leaves_the_older_checkpoint_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(tmp_path, **RUN)
    before = {name: path.read_bytes() for name, path in files_of(tmp_path / "checkpoint-2").items()}

    def full(self: Any, folder: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DPOTrainer, "_save_rng_state", full)
    with pytest.raises(OSError, match="No space"):
        trained(tmp_path, **RUN, seed=1)
    assert {name: path.read_bytes() for name, path in files_of(tmp_path / "checkpoint-2").items()} == before


def test_a_checkpoint_takes_the_place_of_an_older_runs_as_a_whole(tmp_path: Path) -> None:
    trained(tmp_path, **RUN, **FOLLOWS)
    (tmp_path / "checkpoint-2" / "notes.txt").write_text("")
    trained(tmp_path, **RUN)
    manifest = read_manifest(tmp_path / "checkpoint-2")
    assert manifest is not None
    assert files_of(tmp_path / "checkpoint-2").keys() == {*manifest.files, MANIFEST}
    assert not any("moving" in name or name == "notes.txt" for name in manifest.files)
