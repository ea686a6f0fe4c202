"""Tokens and passwords: nowhere in what is shown, logged or saved, and where they belong all the same."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from support.runs import make_trainer
from support.tiny import tiny_model
from tether import DPOConfig
from tether.cli import main
from tether.cli.train import _how_to_resume
from tether.errors import ConfigurationError
from tether.masking import without_secrets
from tether.trainer.manifest import write_manifest

SECRET = "secret-of-mine"


def with_secrets(folder: Path, **options: Any) -> DPOConfig:
    kwargs = {"token": SECRET, "dtype": "float32", "inner": {"password": SECRET}}
    return DPOConfig(str(folder), hub_token=SECRET, model_init_kwargs=kwargs, report_to=[], **options)


@pytest.mark.parametrize(
    "text",
    [
        f"--hub_token {SECRET} --resume",
        f"--hub-token={SECRET}",
        f"`hub_token: {SECRET}` in line 3",
        f"`hub_token={SECRET!r}`",
        f"`hub_token: [{SECRET!r}, 'b']`",
        f'--model_init_kwargs \'{{"dtype": "x", "token": "{SECRET}"}}\'',
        f"`model_init_kwargs: {{dtype: x, token: {SECRET}}}`",
        f"{{'env': {{'HF_TOKEN': {SECRET!r}}}}}",
        f"password={SECRET}",
        "hf_" + "AbCdEfGh12345678",
    ],
)
def test_a_secret_is_hidden_however_it_is_written(text: str) -> None:
    shown = without_secrets(text)
    assert SECRET not in shown and "AbCd" not in shown and "<hidden>" in shown
    assert SECRET not in str(ConfigurationError(text, text, text)) + repr(ConfigurationError(text, text, text))


@pytest.mark.parametrize(
    "text",
    ["token 3 of 12 is nan", "of this token: it is", "`pad_token='<pad>'`", "hub_token=None", "an hf_quantizer", "{}"],
)
def test_other_text_stays_as_it_is(text: str) -> None:
    assert without_secrets(text) == text


def test_a_config_shows_no_secret_and_its_copies_have_them(tmp_path: Path) -> None:
    config = with_secrets(tmp_path)
    shown = [repr(config), str(config), config.to_json_string(), config.to_dict(), config.to_sanitized_dict()]
    assert SECRET not in f"{shown}{pickle.dumps(config)!r}"
    assert "beta=0.1" in repr(config) and "<HUB_TOKEN>" in repr(config)
    for other in (config, copy.copy(config), copy.deepcopy(config), dataclasses.replace(config)):
        assert (other.hub_token, other.model_init_kwargs) == (SECRET, config.model_init_kwargs)
        assert isinstance(other.model_init_kwargs, dict) and other.model_init_kwargs["token"] == SECRET
    assert copy.deepcopy(config).model_init_kwargs is not config.model_init_kwargs


def test_a_run_writes_no_secret(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    secrets: dict[str, Any] = {"hub_token": SECRET, "model_init_kwargs": {"token": SECRET}}
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "precompute_ref_log_probs": True}
    store = str(tmp_path / "store.sqlite")
    trainer = make_trainer(tmp_path / "out", str(tmp_path / "model"), ref_store=store, **secrets, **options)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 15 and not [path for path in files if SECRET.encode() in path.read_bytes()]
    kept = torch.load(tmp_path / "out" / "training_args.bin", weights_only=False)
    assert (kept.hub_token, kept.beta) == (None, trainer.args.beta) and trainer.args.hub_token == SECRET


@pytest.mark.parametrize(
    "words",
    [
        ["--hub_token", SECRET, "--model"],
        ["--hub_tokne", SECRET],
        ["--token", SECRET],
        ["--model_init_kwargs", f'{{"token": "{SECRET}", }}', "--model", "m", "--train_data", "x.jsonl"],
        ["recipe.yaml"],
    ],
)
def test_the_command_shows_no_secret(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(
        f"hub_token: {SECRET}\nhub_token: [{SECRET}]\nmodel_init_kwargs: [{{token: {SECRET}}}]"
    )
    assert main(["train", *words]) == 2
    assert SECRET not in "".join(capsys.readouterr())


def test_the_line_that_says_how_to_go_on_shows_no_secret(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    write_manifest(tmp_path / "checkpoint-1", "run", 1, {})
    args = SimpleNamespace(output_dir=str(tmp_path), save_only_model=False)
    trainer: Any = SimpleNamespace(args=args, state=SimpleNamespace(global_step=1, max_steps=2))
    recipe: Any = SimpleNamespace(script=SimpleNamespace(resume=None))
    said = _how_to_resume(trainer, recipe, ["recipe.yaml", "--hub_token", SECRET])
    assert "tether train recipe.yaml --hub_token <hidden> --resume" in said
