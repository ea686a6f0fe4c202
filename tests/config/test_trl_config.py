"""Every option of TRL's `DPOConfig` is one of ours, with the same default, or the table in docs/trl.md says why not.

`TETHER_WRITE_DOCS=1` writes the table anew; the text around it is written by hand.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import pytest
import trl
from transformers import TrainingArguments

from support.odd_models import mixes_neighbours
from support.runs import DEFAULTS, make_trainer, trained
from support.tiny import tiny_model, tiny_tokenizer
from tether import DPOConfig
from tether.errors import ConfigurationError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "trl.md"

# What is not the same, in words; every other option has TRL's default and meaning.
DIFFERENCES = {
    "bf16": "on where an accelerator supports it, off on a CPU; TRL turns it on everywhere and fails there",
    "gradient_checkpointing": "switched off, and said so, for prefix tuning, Cartridge and activated LoRA",
    "router_aux_loss_coef": "weighs each pair of the optimizer step alike; TRL each micro-batch",
    "truncation_mode": "`keep_end` is not deprecated",
    "padding_free": "rows have no padding by default; True makes it an error where the model needs some. TRL warns "
    "and pads",
    "pad_to_multiple_of": "`auto` and None only: there is no padding to round up",
    "precompute_ref_log_probs": "kept on disk by content, shared by runs; also for streams",
    "precompute_ref_batch_size": "by default the tokens of four training micro-batches, up to 16,384; an error without "
    "`precompute_ref_log_probs`",
    "loss_type": "see [losses](losses.md): `sft` and `bco_pair` follow their papers where TRL does not",
    "label_smoothing": "also in `sigmoid` and `sigmoid_norm`, where TRL ignores it; an error where no loss reads it, "
    "and outside [0, 0.5)",
    "ld_alpha": "an error where no loss reads it, and outside [0, 1]",
    "f_divergence_type": "an unknown name is an error at construction",
    "f_alpha_divergence_coef": "an error without the alpha-divergence",
    "discopop_tau": "an error without `discopop`",
    "use_weighting": "also trains with `hinge`, where TRL's backward fails; sorting losses are refused with both",
    "activation_offloading": "needs an accelerator; an error on a CPU, where TRL fails without a reason",
    "ref_model_mixup_alpha": "an error outside [0, 1], and without `sync_ref_model`",
    "ref_model_sync_steps": "an error without `sync_ref_model`",
    "sync_ref_model": "the reference's state is saved with every checkpoint and resumed; TRL loses it",
    "pad_token": "deprecated, with the same warning",
    "model_init_kwargs": "an error with a model that is an instance; TRL warns. `torch_dtype` in it is an error; TRL "
    "ignores it",
}

START, END = "<!-- options: made by tests/config/test_trl_config.py -->\n", "<!-- end -->\n"
HEAD = """\
| option | TRL's default | ours | difference |
| --- | --- | --- | --- |
"""


def default_of(entry: Field[Any]) -> Any:
    return entry.default_factory() if entry.default_factory is not MISSING else entry.default


def defaults(config: type) -> dict[str, Any]:
    return {entry.name: default_of(entry) for entry in fields(config)}


THEIRS, OURS, PLAIN = (defaults(config) for config in (trl.DPOConfig, DPOConfig, TrainingArguments))
OWN = [name for name, value in THEIRS.items() if name not in PLAIN or PLAIN[name] != value]


def test_every_option_of_trl_is_ours_with_the_same_default() -> None:
    assert [name for name in THEIRS if name not in OURS] == []
    others = {name: (OURS[name], value) for name, value in THEIRS.items() if OURS[name] != value}
    assert others == {"logging_nan_inf_filter": (False, True)}  # such a loss ends the run


def test_every_difference_is_of_an_option_that_trl_has() -> None:
    assert set(DIFFERENCES) <= set(OWN)


def table() -> str:
    """What stands between the two marks of the page; the rest is written by hand."""
    rows = [
        f"| `{name}` | `{THEIRS[name]!r}` | `{OURS[name]!r}` | {DIFFERENCES.get(name, 'none')} |"
        for name in sorted(OWN)
    ]
    ours_only = ", ".join(f"`{name}`" for name in OURS if name not in THEIRS)
    return HEAD + "\n".join(rows) + f"\n\nOurs alone: {ours_only}.\n"


def test_the_page_is_what_the_configs_say() -> None:
    before, marked, rest = PAGE.read_text().partition(START)
    written, closed, after = rest.partition(END)
    assert marked and closed
    if os.environ.get("TETHER_WRITE_DOCS"):
        PAGE.write_text(before + START + table() + END + after)
    else:
        assert written == table()


# -------------------------------------------------------------------------------------- what the table says


@pytest.mark.parametrize("value", [8, "64"])
def test_padding_to_a_multiple_is_refused(value: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="pad_to_multiple_of"):
        DPOConfig(str(tmp_path), **DEFAULTS, pad_to_multiple_of=value)
    for same in ("auto", None, "none"):
        assert DPOConfig(str(tmp_path), **DEFAULTS, pad_to_multiple_of=same).pad_to_multiple_of is None


def test_activation_offloading_is_refused_on_a_cpu(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="gradient_checkpointing"):
        DPOConfig(str(tmp_path), **DEFAULTS, activation_offloading=True, use_cpu=True)


def test_padding_free_trains_where_rows_can_be_packed_and_is_refused_where_not(tmp_path: Path) -> None:
    trained(tmp_path, padding_free=True, max_steps=1)
    with pytest.raises(ConfigurationError, match="padding_free"):
        make_trainer(tmp_path, tiny_model("mamba"), padding_free=True)
    with pytest.raises(ConfigurationError, match="padding_free"):
        make_trainer(tmp_path, mixes_neighbours(), padding_free=True)


def test_pad_token_is_accepted_with_the_warning_of_trl(tmp_path: Path) -> None:
    with pytest.warns(FutureWarning, match="`pad_token` is deprecated") as caught:
        DPOConfig(str(tmp_path), **DEFAULTS, pad_token="<unk>")
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        tokenizer = make_trainer(tmp_path, processing_class=tiny_tokenizer(), pad_token="<unk>").processing_class
        assert tokenizer.pad_token == "<unk>"
        with pytest.raises(ConfigurationError, match="pad_token"):
            make_trainer(tmp_path, pad_token="<nowhere>")
