"""The words that options take: an editor knows them, and the parsers of transformers and TRL still read them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from transformers import HfArgumentParser
from trl import TrlParser

from tether import DPOConfig
from tether.losses import DIVERGENCES, LOSSES, DivergenceName, LossName

ROOT = Path(__file__).resolve().parents[2]


def test_the_words_of_the_types_are_those_of_the_tables() -> None:
    assert get_args(LossName) == tuple(LOSSES)
    assert get_args(DivergenceName) == tuple(DIVERGENCES)


@pytest.mark.slow  # 30 s where mypy has no cache
def test_a_type_checker_accepts_the_documented_words_and_marks_others() -> None:
    command = [sys.executable, "-m", "mypy", "tests/config/typed_options.py"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


def parsed(parser: type[HfArgumentParser], *words: str) -> Any:
    options: Any = DPOConfig
    return parser(options).parse_args_into_dataclasses(["--output_dir", "out", *words])[0]


@pytest.mark.parametrize("parser", [HfArgumentParser, TrlParser])
def test_the_parsers_of_transformers_and_trl_read_the_options(parser: type[HfArgumentParser]) -> None:
    words = "--loss_type sigmoid sft --truncation_mode keep_end --bad_rows drop --f_divergence_type forward_kl"
    of_store = "--precompute_ref_log_probs --ref_store_mode lazy --ref_dtype bfloat16"
    config = parsed(parser, *words.split(), *of_store.split())
    assert (config.loss_type, config.truncation_mode, config.bad_rows) == (["sigmoid", "sft"], "keep_end", "drop")
    assert (config.f_divergence_type, config.ref_store_mode) == ("forward_kl", "lazy")
    assert config.ref_dtype == "bfloat16" and parsed(parser).ref_dtype is None
    assert parsed(parser).loss_type == ["sigmoid"] and parsed(parser, "--loss_type", "ipo").loss_type == ["ipo"]


@pytest.mark.parametrize("parser", [HfArgumentParser, TrlParser])
def test_the_parsers_refuse_another_word(parser: type[HfArgumentParser], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed(parser, "--truncation_mode", "keep_strat")
    assert "invalid choice: 'keep_strat'" in capsys.readouterr().err
