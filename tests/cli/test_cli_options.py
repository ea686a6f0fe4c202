"""The list of a recipe's options says what `ScriptOptions`, `DPOConfig` and accelerate's launcher take.

`TETHER_WRITE_OPTIONS=1` writes `src/tether/cli/recipe.schema.json` anew: `tether schema` prints it, `--help` is made
of it, and recipes and flags are read by it, without torch.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import time
import typing
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import transformers
from accelerate.commands.launch import launch_command_parser
from pydantic import TypeAdapter
from transformers import TrainingArguments

from tether.cli import main
from tether.cli.options import OPTIONS, Part, ScriptOptions
from tether.cli.trl_options import REFUSED
from tether.config.dpo_config import DPOConfig
from tether.losses import LOSSES

ROOT = Path(__file__).resolve().parents[2]
SOURCE, CONSTRAINTS = ROOT / "src", ROOT / "constraints.txt"
FILE = SOURCE / "tether" / "cli" / "recipe.schema.json"

# Headings of --help, in order, with the options under each; the last takes what is transformers' and named by none.
REST = "everything else (of transformers.TrainingArguments)"
GROUPS = {
    "what to train, and on what": "model train_data datasets dataset_config dataset_train_split eval_data "
    "eval_fraction dataset_test_split split_seed dataset_streaming output_dir tokenizer resume dry_run columns "
    "max_length truncation_mode bad_rows dataset_num_proc model_revision dtype load_in_8bit load_in_4bit "
    "bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage attn_implementation model_init_kwargs "
    "trust_remote_code",
    "how to train": "beta loss_type loss_weights label_smoothing f_divergence_type f_alpha_divergence_coef ld_alpha "
    "discopop_tau use_weighting bco_reward_shift router_aux_loss_coef learning_rate lr_scheduler_type warmup_steps "
    "num_train_epochs max_steps per_device_train_batch_size max_tokens_per_micro_batch "
    "gradient_accumulation_steps seed bf16 gradient_checkpointing disable_dropout",
    "LoRA": "use_peft lora_r lora_alpha lora_dropout lora_target_modules lora_target_parameters lora_modules_to_save "
    "use_rslora use_dora",
    "the reference": "ref_model precompute_ref_log_probs precompute_ref_batch_size ref_store ref_store_mode "
    "ref_store_verify ref_columns sync_ref_model ref_model_mixup_alpha ref_model_sync_steps ref_model_sync_rank "
    "ref_dtype reference_free",
    "when to log, evaluate and save": "logging_steps eval_strategy eval_steps per_device_eval_batch_size save_strategy "
    "save_steps save_total_limit report_to run_name disable_tqdm report_samples "
    "report_samples_max_new_tokens logging_nan_inf_filter",
    REST: "",
}
GROUP_OF = {name: title for title, names in GROUPS.items() for name in names.split()}
RANK = {name: rank for rank, name in enumerate(GROUP_OF)}

# Mappings that transformers also takes as the path of a JSON file.
MAY_BE_FILES = ("accelerator_config", "deepspeed", "fsdp_config")

# The launcher's options for machines and parallelism that Tether does not know, and what is decided by the command.
OTHERS = ("aws_", "fp8_", "megatron_", "mpirun_", "parallelism_", "tpu", "no_tpu", "use_megatron", "use_parallelism")
DECIDED = (
    "module",
    "no_python",
    "env",
    "vm",
    "main_training_function",
    "mixed_precision",
    "downcast_bf16",
    "training_script",
    "training_script_args",
    "nondefault",
)


# ------------------------------------------------------------------------------------------------- the list


def made_schema() -> dict[str, Any]:
    names = [*dataclasses.fields(ScriptOptions), *dataclasses.fields(DPOConfig)]
    hints = typing.get_type_hints(ScriptOptions) | typing.get_type_hints(DPOConfig)
    options = {field.name: option_of(field, hints[field.name]) for field in names if field.init}
    ordered = sorted(options, key=lambda name: (list(GROUPS).index(options[name]["group"]), RANK.get(name, len(RANK))))
    properties = {name: options[name] for name in ordered}
    for field in dataclasses.fields(ScriptOptions):
        for alias in field.metadata.get("aliases", ()):
            properties[alias] = {"$ref": f"#/properties/{field.name}"}
    properties |= {name: option for name, option in launcher_options().items() if name not in properties}
    properties |= {name: {"description": option.why, "const": option.default} for name, option in REFUSED.items()}
    scalars = ["string", "number", "boolean", "null"]
    properties["env"] = {
        "description": "Environment variables, set before the model is loaded.",
        "type": ["object", "null"],
        "additionalProperties": {"type": scalars},
    }
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A recipe of tether train",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "$defs": {"Part": TypeAdapter(Part).json_schema()},
    }


def flat_schema(hint: Any) -> dict[str, Any]:
    """The JSON schema of a type hint, with all that a union allows in one `type`."""
    schema = TypeAdapter(hint).json_schema()
    definitions = schema.pop("$defs", {})

    def flatten(part: dict[str, Any]) -> dict[str, Any]:
        flat: dict[str, Any] = {"type": []}
        for kind in part.get("anyOf", [part]):
            kind = definitions[kind["$ref"].rpartition("/")[2]] if "$ref" in kind else kind
            flat["type"] += [kind["type"]] if kind["type"] not in flat["type"] else []
            flat |= {"items": flatten(kind["items"])} if "items" in kind else {}
            flat |= {"enum": kind["enum"]} if "enum" in kind else {}
        return flat

    return flatten(schema)


def option_of(field: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:  # noqa: C901
    name, choices = field.name, field.metadata.get("choices")
    kinds = [kind for kind in typing.get_args(hint) or (hint,)] if typing.get_origin(hint) is not list else [hint]
    if any(isinstance(kind, type) and issubclass(kind, Enum) for kind in kinds):  # transformers' `Enum | str`
        hint = next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum))
    if name == "parallelism_config":  # an object of Python's, which no recipe can write
        hint = type(None)
    schema = flat_schema(hint)
    if choices is not None:
        schema["enum"] = list(choices)
    if "enum" in schema and "null" in schema["type"]:
        schema["enum"].append(None)
    if "object" in schema["type"] and name not in MAY_BE_FILES:
        schema["type"] = [kind for kind in schema["type"] if kind != "string"]
    if "nargs" in field.metadata and "boolean" not in schema["type"]:  # a flag that may stand alone
        schema["type"].append("boolean")
    if name in ("resume", "resume_from_checkpoint"):  # alone, from the last one
        schema["type"].append("boolean")
    if name == "loss_type":
        schema["items"]["enum"] = list(LOSSES)  # for HfArgumentParser, it is a list of plain words
    if name == "datasets":
        schema["items"] = {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/Part"}]}
    elif schema["type"][0] == "array":  # a list of one may be written as the one
        schema["type"].append(schema["items"]["type"][0])
    own = name not in {entry.name for entry in dataclasses.fields(TrainingArguments)}
    default = field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[misc]
    text = " ".join((field.metadata.get("help") or "").split())
    text = text if own else shortened(text)
    group = GROUP_OF.get(name, "how to train" if own else REST)
    return {"description": text, **schema, "default": getattr(default, "value", default), "group": group}


def shortened(text: str) -> str:
    """The first sentence, and what the default is where the text says so."""
    first, stop, rest = " ".join(text.split()).partition(". ")
    return f"{first}{stop.strip()} {rest}" if rest.startswith("Default:") else first + stop.strip()


def launcher_options() -> dict[str, Any]:
    parser = launch_command_parser()
    found: dict[str, Any] = {
        "accelerate_config": {"description": "single_gpu, multi_gpu, zero1, zero2, zero3, fsdp2, or a file."}
    }
    for name in vars(parser.parse_args(["script"])):
        if name in DECIDED or name.startswith(OTHERS):
            continue
        found[name] = {"type": ["boolean"] if stands_alone(parser, name) else ["string", "number", "boolean", "null"]}
    common = {"description": "An option of accelerate launch.", "type": ["string"]}
    return {name: {**common, **option, "launcher": True} for name, option in found.items()}


def stands_alone(parser: argparse.ArgumentParser, name: str) -> bool:
    """Whether the word after this flag is not its value."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
        return bool(parser.parse_args([f"--{name}", "1", "script"]).training_script == "1")
    return False  # another value than 1 is expected


def written(schema: dict[str, Any]) -> str:
    """An option on each line, for eyes and for diffs."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(option)}" for name, option in schema["properties"].items())
    return (
        json.dumps({**schema, "properties": 0}, indent=1).replace(
            '"properties": 0', f'"properties": {{\n{lines}\n }}', 1
        )
        + "\n"
    )


def test_the_list_of_options_is_made_of_the_dataclasses() -> None:
    if f"transformers=={transformers.__version__}" not in CONSTRAINTS.read_text():
        pytest.skip("the list is made of the options of the version in constraints.txt")
    made = written(made_schema())
    if os.environ.get("TETHER_WRITE_OPTIONS"):
        FILE.write_text(made)
    assert FILE.read_text() == made, "write it anew with TETHER_WRITE_OPTIONS=1"


# ------------------------------------------------------------------------------------------------ what it is for


@pytest.mark.parametrize("words", [["train", "--help"], ["precompute", "--help"], ["train", "--bata", "1"], ["schema"]])
def test_neither_help_nor_a_mistake_waits_for_torch(words: list[str]) -> None:
    check = (
        "import sys, tether.cli; tether.cli.main(sys.argv[1:]); assert not {'torch', 'transformers'} & {*sys.modules}"
    )
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    started = time.process_time() + sum(os.times()[2:4])
    done = subprocess.run([sys.executable, "-c", check, *words], env=environment, capture_output=True, text=True)
    seconds = time.process_time() + sum(os.times()[2:4]) - started  # of the processor: other work is not counted
    assert done.returncode == 0, done.stderr
    assert seconds < 1


def test_the_schema_is_printed_and_holds_what_recipes_hold(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    known, kinds = schema["properties"], {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}
    kinds |= {"NoneType": "null", "list": "array", "dict": "object"}
    for name in OPTIONS:
        option, default = known[name], known[name]["default"]
        kind = kinds[type(default).__name__]
        assert kind in option["type"] or (kind == "integer" and "number" in option["type"]), name
        assert "enum" not in option or default in option["enum"], name
    recipe = {"model_name_or_path", "dataset_name", "test_split_size", "num_processes", "accelerate_config", "env"}
    assert schema["additionalProperties"] is False and recipe | set(REFUSED) <= set(known)
    assert known["datasets"]["items"]["anyOf"][1]["$ref"] == "#/$defs/Part"
    assert schema["$defs"]["Part"]["required"] == ["path"]


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("tether st", ["store"]),
        ("tether store ex", ["export"]),
        ("tether train --truncation", ["--truncation_mode"]),
        ("tether train recipe.yaml --truncation_mode keep_", ["keep_start", "keep_end"]),
    ],
)
def test_a_shell_completes_verbs_options_and_choices(words: str, completed: list[str]) -> None:
    asked = {"_TETHER_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    environment = os.environ | {"PYTHONPATH": str(SOURCE)} | asked
    done = subprocess.run([sys.executable, "-m", "tether"], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == completed, done.stderr


def test_the_environment_names_versions_devices_and_the_store(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    for name in ("Python", "torch", "transformers", "accelerate", "peft", "datasets", "pydantic", "devices", "store"):
        assert re.search(rf"^{name} +\S", out, re.MULTILINE), out
