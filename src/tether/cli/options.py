"""The options of a recipe, and how each is read.

`recipe.schema.json` lists them. `tests/cli/test_cli_options.py` generates it from `ScriptOptions` and `DPOConfig`
(`TETHER_WRITE_OPTIONS=1` rewrites it), so that help texts and errors need not wait for torch to be imported. Knows
names and types; reads no file and builds nothing.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, partial, reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic.dataclasses
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, create_model

from tether.config.option_types import faults
from tether.refusals import nearest_to


def _option(default: Any, text: str, **metadata: Any) -> Any:
    """A field with its help text."""
    return field(default=default, metadata={"help": text, **metadata})


@pydantic.dataclasses.dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Part:
    """One set of a mixture.

    Attributes:
        path: A file, a folder, a name on the hub, or the name of a format (`json`, with `data_files`).
        name: A configuration of a dataset that has several.
        data_dir: The folder of its data, as in `datasets.load_dataset`.
        data_files: Its files, likewise.
        split: A split, or a slice of one.
        columns: The columns to keep; by default all.
        fraction: Its share of the mixture, relative to the other parts; either all parts have one or none. The first
            rows of each part are used, as many as fit without repeating a row.
    """

    path: str
    name: str | None = None
    data_dir: str | None = None
    data_files: Any = None
    split: str | None = None
    columns: list[str] | None = None
    fraction: float | None = None


@dataclass(frozen=True)
class ScriptOptions:
    """The options of a recipe that are not `DPOConfig`'s: model, data, adapter, and where to resume.

    Attributes: each is explained by its help text below.
    """

    model: str | None = _option(None, "The policy: a folder or a name on the hub.", aliases=["model_name_or_path"])
    train_data: str | None = _option(
        None,
        "Pairs to train on: a .json, .jsonl, .csv or .parquet file, a folder of them, or a dataset on the hub, "
        "`owner/name` or `owner/name:split`.",
        aliases=["dataset", "dataset_name"],
    )
    datasets: list[Part] | None = _option(
        None, "Or several sets as one: paths or names; a recipe can set more for each (docs/recipes.md)."
    )
    dataset_config: str | None = _option(None, "The configuration of train_data, if a dataset has several.")
    dataset_train_split: str | None = _option(
        None, "The split of train_data to train on, or a slice of it. Default: train."
    )
    dataset_test_split: str | None = _option(
        None,
        "The held-out split of train_data. Default: test, if eval_strategy is set and train_data is not a file.",
    )
    dataset_streaming: bool = _option(
        False, "Read the pairs as they are needed; needs max_steps.", aliases=["streaming"]
    )
    eval_data: str | None = _option(None, "Held-out pairs, named in the same way.")
    eval_fraction: float | None = _option(
        None,
        "Or: the share of the training pairs to hold out, or their number; pairs of one prompt stay together.",
        aliases=["test_split_size"],
    )
    split_seed: int = _option(
        0, "Which pairs eval_fraction holds out; separate from `seed`, so that all seeds share one set."
    )
    tokenizer: str | None = _option(None, "Folder or name of the tokenizer. Default: the one in the model's folder.")
    resume: str | None = _option(
        None, "Resume from a checkpoint: its folder, or no value for the last one in output_dir."
    )
    ref_model: str | None = _option(None, "Another model as the reference: a folder or a name on the hub.")
    model_revision: str | None = _option(None, "Branch, tag or commit of the policy on the hub. Default: main.")
    dtype: str | None = _option(
        None, "Dtype of the policy's weights. Default: float32.", choices=["auto", "bfloat16", "float16", "float32"]
    )
    load_in_8bit: bool = _option(False, "Hold the frozen weights in 8 bits (bitsandbytes).")
    load_in_4bit: bool = _option(False, "Hold the frozen weights in 4 bits (QLoRA).")
    bnb_4bit_quant_type: str = _option("nf4", "4-bit data type.", choices=["fp4", "nf4"])
    use_bnb_nested_quant: bool = _option(False, "Quantize the scales of the 4-bit blocks too.")
    bnb_4bit_quant_storage: str | None = _option(None, "Storage dtype of 4-bit weights. Default: uint8.")
    attn_implementation: str | None = _option(
        None, "Attention implementation of the policy, as transformers names them."
    )
    use_peft: bool | None = _option(None, "Train a LoRA adapter, by default TRL's: rank 16, alpha 32, dropout 0.05.")
    lora_r: int | None = _option(None, "Train a LoRA adapter of this rank instead of the model's own weights.")
    lora_alpha: float | None = _option(
        None, "Scale of the adapter: its update is multiplied by lora_alpha / lora_r. Default: 2 lora_r."
    )
    lora_dropout: float | None = _option(None, "Dropout before the adapter; needs disable_dropout=false. Default: 0.")
    lora_target_modules: list[str] | None = _option(
        None, "Layers to adapt, or `all-linear`. Default: PEFT's choice for the model's family."
    )
    lora_target_parameters: list[str] | None = _option(
        None, "Parameters to adapt, for weights that are not layers of their own."
    )
    lora_modules_to_save: list[str] | None = _option(None, "Layers that train in full beside the adapter.")
    use_rslora: bool = _option(False, "Scale the adapter by lora_alpha / sqrt(lora_r) instead.")
    use_dora: bool = _option(False, "Also train the magnitude of each weight's rows (DoRA).")
    dry_run: bool = _option(False, "Stop before the first step: show sets, lengths, the reference and the first pair.")


SCHEMA_TEXT = Path(__file__).with_name("recipe.schema.json").read_text(encoding="utf-8")
_PROPERTIES: dict[str, dict[str, Any]] = json.loads(SCHEMA_TEXT)["properties"]

# The options of a run by name, with their headings in --help; TRL's names for some; and those of `accelerate launch`.
OPTIONS = {name: option for name, option in _PROPERTIES.items() if "group" in option}
ALIASES = {name: option["$ref"].rpartition("/")[2] for name, option in _PROPERTIES.items() if "$ref" in option}
LAUNCHER = {name: option for name, option in _PROPERTIES.items() if option.get("launcher")}
SCRIPT_NAMES = frozenset(ScriptOptions.__dataclass_fields__)


def help_of(name: str) -> str:
    """The help text of an option."""
    return str((OPTIONS | LAUNCHER).get(ALIASES.get(name, name), {}).get("description", ""))


def read_values(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Reads the values written for options, by the type of each.

    Args:
        values: By option: text, as in a flag or a plain line of a recipe; None; a list; or a mapping.

    Returns:
        The values, and the faults of the options that cannot be read. If there are faults, there are no values.
    """
    try:
        read = _model().model_validate(dict(values))
    except ValidationError as error:
        return {}, faults(error)
    return {name: getattr(read, name) for name in values}, {}


@cache
def _model() -> type[BaseModel]:
    config = ConfigDict(coerce_numbers_to_str=True, protected_namespaces=())
    kinds: dict[str, Any] = {
        name: (Annotated[_kind(option), BeforeValidator(partial(_as_written, option))], None)
        for name, option in OPTIONS.items()
    }
    return create_model("Recipe", __config__=config, **kinds)


_KINDS = {"boolean": bool, "integer": int, "number": float, "string": str, "object": dict[str, Any], "null": None}


def _kind(option: Mapping[str, Any]) -> Any:
    """The type hint of a flat schema."""
    if "type" not in option:  # a part of `datasets`
        return Annotated[Part, BeforeValidator(_part)]
    literal: Any = Literal  # Any, since mypy would resolve the subscript as a type
    lists: Any = list
    words: Any = literal[tuple(option["enum"])] if "enum" in option else str
    hints: dict[str, Any] = {"string": words, "array": lists[_kind(option["items"])] if "items" in option else list}
    single = [] if option["type"][0] != "array" else option["items"].get("type", [])  # one value is a list by now
    return reduce(or_, [hints.get(kind, _KINDS.get(kind)) for kind in option["type"] if kind not in single])


def _part(written: Any) -> Any:
    if isinstance(written, str):
        return {"path": written}
    known = Part.__dataclass_fields__
    if not isinstance(written, dict) or "path" not in written:
        raise ValueError("a part of a mixture has a path: write `- path: pairs.jsonl`, or `- path: owner/name`")
    for name in written:
        if name not in known:
            meant = f" (did you mean `{near}`?)" if (near := nearest_to(str(name), known)) else ""
            raise ValueError(f"there is no option `{name}` of a part{meant}, which has {', '.join(known)}")
    return written


def _as_written(option: Mapping[str, Any], value: Any) -> Any:
    """Converts text that pydantic does not: `none`, true and false beside words, JSON, `1e3` as a number.

    If any word is a valid value, `none` is one. If a list comes first among the types, one value is a list of one.
    """
    kinds = option["type"]
    takes_words = "string" in kinds and "enum" not in option and kinds[0] != "array"
    if isinstance(value, str):
        word = value.lower()
        if "null" in kinds and word in ("none", "null") and ("object" in kinds or not takes_words):
            return None
        if "boolean" in kinds and word in ("true", "false"):
            return word == "true"
        if "object" in kinds:
            with contextlib.suppress(ValueError):
                return json.loads(value)
        if "integer" in kinds and not takes_words:
            with contextlib.suppress(ValueError):
                return float(value) if not word.lstrip("+-").isdigit() else value
    is_one = kinds[0] == "array" and "type" in option["items"] and not isinstance(value, list | dict | None)
    return [value] if is_one else value
