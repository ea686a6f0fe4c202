"""What a Python script imports to have a command line: TRL's names, defaults and meaning."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import trl
from datasets import Dataset

import tether
from support.tiny import tiny_pairs

DATACLASSES = ("ModelConfig", "ScriptArguments", "DatasetMixtureConfig")


def both(name: str) -> tuple[Any, Any]:
    return getattr(tether, name), getattr(trl, name)


@pytest.mark.parametrize("name", DATACLASSES)
def test_a_scripts_options_have_trls_names_and_defaults(name: str) -> None:
    ours, theirs = both(name)
    assert [field.name for field in fields(ours)] == [field.name for field in fields(theirs)]
    assert vars(ours()) == vars(theirs())


COMMAND_LINES: dict[str, list[str]] = {
    "nothing": [],
    "an adapter": ["--use_peft", "--lora_r", "4", "--lora_alpha", "8", "--lora_target_modules", "q_proj", "v_proj"],
    "every linear layer": ["--use_peft", "true", "--lora_target_modules", "all-linear", "--use_dora"],
    "layers by a pattern": ["--use_peft", "--lora_target_modules", ".*q_proj"],
    "four bits": ["--load_in_4bit", "--dtype", "bfloat16", "--use_bnb_nested_quant"],
    "eight bits": ["--load_in_8bit", "--use_peft"],
}


@pytest.mark.parametrize("case", COMMAND_LINES)
def test_a_command_line_makes_the_adapter_and_the_quantization_that_trl_makes(case: str) -> None:
    found = []
    for library in (tether, trl):
        (options,) = library.TrlParser(library.ModelConfig).parse_args_and_config(COMMAND_LINES[case])
        made = library.get_peft_config(options), library.get_quantization_config(options)
        found.append([each and each.to_dict() for each in made])
    assert found[0] == found[1]


def test_a_single_layer_is_a_name() -> None:
    """TRL makes a regular expression of it, which matches no layer."""
    (options,) = tether.TrlParser(tether.ModelConfig).parse_args_and_config(
        ["--use_peft", "--lora_target_modules", "q_proj"]
    )
    assert tether.get_peft_config(options).target_modules == {"q_proj"}


def test_flags_win_over_a_file_whose_variables_are_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    path = tmp_path / "run.yaml"
    lines = f"output_dir: {tmp_path}", "beta: 0.3", "lora_r: 8", "loss_type: [sigmoid, ipo]", "env:\n  TETHER_TRIED: 1"
    path.write_text("\n".join(lines))
    two_words, one_word = ["--config", str(path)], [f"--config={path}"]
    for library, given in ((trl, two_words), (tether, two_words), (tether, one_word)):
        parser = library.TrlParser((library.DPOConfig, library.ModelConfig))
        config, model = parser.parse_args_and_config([*given, "--lora_r", "2", "--bf16", "false"])
        assert (config.beta, config.loss_type, model.lora_r) == (0.3, ["sigmoid", "ipo"], 2)
        assert os.environ.pop("TETHER_TRIED") == "1"


def test_unknown_names_of_file_and_command_line_are_refused_together(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"output_dir: {tmp_path}\nmax_prompt_length: 5\n")
    parser = tether.TrlParser((tether.DPOConfig, tether.ModelConfig))
    words = ["--config", str(path), "--lora_rr", "2", "--rpo_alpha=1"]
    with pytest.raises(ValueError, match="Cannot use `max_prompt_length`, `lora_rr` and `rpo_alpha`") as caught:
        parser.parse_args_and_config(words)
    assert "Did you mean `--lora_r`?" in str(caught.value) and "loss_weights" in str(caught.value)
    *_, left = parser.parse_args_and_config(words, return_remaining_strings=True)
    assert left == ["--max_prompt_length", "5", "--lora_rr", "2", "--rpo_alpha=1"]


def test_an_option_that_the_command_line_has_is_named_as_its_flag() -> None:
    words = ["--torch_dtype", "bfloat16", "--lora_rank", "4", "--base_model", "m"]
    with pytest.raises(ValueError) as caught:
        tether.TrlParser((tether.DPOConfig, tether.ModelConfig)).parse_args_and_config(words)
    for written in ("`--dtype`", "`--lora_r`", "`DPOTrainer(...)`"):
        assert f"Write {written}." in str(caught.value)
    with pytest.raises(ValueError, match="`lr`: it has another name here") as caught:
        tether.TrlParser((tether.DPOConfig,)).parse_args_and_config(["--lr", "1", "--beta", "0.2"])
    assert "Write `--learning_rate`." in str(caught.value)
    with pytest.raises(ValueError, match=r"model_init_kwargs=\{'dtype': ...\}"):
        tether.TrlParser((tether.DPOConfig,)).parse_args_and_config(words[:2])


def test_options_that_no_script_can_use_are_refused() -> None:
    with pytest.raises(ValueError, match="with `load_in_8bit` and `lora_task_type='SEQ_CLS'`"):
        tether.ModelConfig(load_in_4bit=True, load_in_8bit=True, lora_task_type="SEQ_CLS")


# ------------------------------------------------------------------------------------------------------------- data


def test_several_files_are_one_set_with_held_out_rows(tmp_path: Path) -> None:
    for name, count in (("a", 6), ("b", 4)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in tiny_pairs(count, seed=count)))
    parts: list[Any] = [{"path": str(tmp_path / "a.jsonl")}, {"path": str(tmp_path / "b.jsonl")}]
    whole = tether.get_dataset(tether.DatasetMixtureConfig(parts))["train"]
    named = [{**part, "path": "json", "data_files": part["path"]} for part in parts]
    theirs = trl.get_dataset(trl.DatasetMixtureConfig(named))["train"]
    assert whole.to_list() == theirs.to_list() and len(whole) == 10
    for size in (0.3, 3):
        cut = tether.get_dataset(tether.DatasetMixtureConfig(parts, test_split_size=size))
        assert len(cut["test"]) == 3 and isinstance(cut["train"], Dataset)
        assert not {row["prompt"] for row in cut["test"]} & {row["prompt"] for row in cut["train"]}


def test_a_part_is_checked_before_it_is_read() -> None:
    with pytest.raises(ValueError, match="did you mean `path`"):
        tether.DatasetMixtureConfig([{"path": "a", "pth": "b"}])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="nothing would be in it"):
        tether.get_dataset(tether.DatasetMixtureConfig())
