"""What a Python script of TRL's imports to have a command line: its options as dataclasses, and what is made of them.

The options mean what they mean in a recipe, and have its help texts; defaults are TRL's. Trains nothing.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from datasets import Dataset, DatasetDict
from transformers import BitsAndBytesConfig, HfArgumentParser

from tether.cli.mixture import load_mixture
from tether.cli.options import Part, ScriptOptions, read_values
from tether.cli.pairs import hold_out, without_row_numbers
from tether.cli.quantization import quantization_of
from tether.cli.trl_options import REFUSED
from tether.config.former_options import SYNONYMS
from tether.config.rules.options import refused_names
from tether.errors import ConfigurationError
from tether.models.preparing import lora_config
from tether.refusals import Refusal, of_option, refuse


def _as_in_a_recipe(name: str, default: Any, recipe_name: str = "") -> Any:
    """A field with the help text of a recipe's option."""
    option = ScriptOptions.__dataclass_fields__[recipe_name or name]
    shown = {key: value for key, value in option.metadata.items() if key != "aliases"}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=shown)
    return field(default=default, metadata=shown)


@dataclass
class ModelConfig:
    """Options of the policy and its adapter, for a script's command line.

    Each field is the option of that name in a recipe (`docs/recipes.md`), with TRL's default.

    Raises:
        ConfigurationError: For 4 and 8 bits at once, and another `lora_task_type` than `CAUSAL_LM`.
    """

    model_name_or_path: str | None = _as_in_a_recipe("model_name_or_path", None, "model")
    model_revision: str = _as_in_a_recipe("model_revision", "main")
    dtype: str | None = _as_in_a_recipe("dtype", "float32")
    attn_implementation: str | None = _as_in_a_recipe("attn_implementation", None)
    use_peft: bool = _as_in_a_recipe("use_peft", False)
    lora_r: int = _as_in_a_recipe("lora_r", 16)
    lora_alpha: float = _as_in_a_recipe("lora_alpha", 32)
    lora_dropout: float = _as_in_a_recipe("lora_dropout", 0.05)
    lora_target_modules: list[str] | None = _as_in_a_recipe("lora_target_modules", None)
    lora_target_parameters: list[str] | None = _as_in_a_recipe("lora_target_parameters", None)
    lora_modules_to_save: list[str] | None = _as_in_a_recipe("lora_modules_to_save", None)
    lora_task_type: str = field(default="CAUSAL_LM", metadata={"help": "CAUSAL_LM: responses are scored by one."})
    use_rslora: bool = _as_in_a_recipe("use_rslora", False)
    use_dora: bool = _as_in_a_recipe("use_dora", False)
    load_in_8bit: bool = _as_in_a_recipe("load_in_8bit", False)
    load_in_4bit: bool = _as_in_a_recipe("load_in_4bit", False)
    bnb_4bit_quant_type: str = _as_in_a_recipe("bnb_4bit_quant_type", "nf4")
    use_bnb_nested_quant: bool = _as_in_a_recipe("use_bnb_nested_quant", False)
    bnb_4bit_quant_storage: str | None = _as_in_a_recipe("bnb_4bit_quant_storage", None)

    def __post_init__(self) -> None:
        refuse(self._refused())

    def _refused(self) -> Iterable[Refusal]:
        if self.load_in_4bit and self.load_in_8bit:
            yield Refusal("`load_in_4bit` with `load_in_8bit`", "weights have one precision", "Keep one of the two.")
        only = REFUSED["lora_task_type"]
        if self.lora_task_type != only.default:
            yield of_option("lora_task_type", self.lora_task_type, only.why.rstrip("."), only.instead)


@dataclass
class ScriptArguments:
    """Options of a script's data.

    Each field is the option of that name in a recipe (`docs/recipes.md`), with TRL's default. `ignore_bias_buffers`
    is read by TRL's script alone.
    """

    dataset_name: str | None = _as_in_a_recipe("dataset_name", None, "train_data")
    dataset_config: str | None = _as_in_a_recipe("dataset_config", None)
    dataset_train_split: str = _as_in_a_recipe("dataset_train_split", "train")
    dataset_test_split: str = _as_in_a_recipe("dataset_test_split", "test")
    dataset_streaming: bool = _as_in_a_recipe("dataset_streaming", False)
    ignore_bias_buffers: bool = field(
        default=False, metadata={"help": "Keep boolean buffers from being sent to the other processes."}
    )


@dataclass
class DatasetMixtureConfig:
    """Several sets as one, for `get_dataset`.

    Args:
        datasets: Its parts: paths or names, or dicts of the fields that a recipe's `datasets` have.
        streaming: Read the rows as they are needed.
        test_split_size: The share of the rows to hold out, below 1, or their number; pairs of one prompt stay
            together.

    Raises:
        ConfigurationError: For a part without a path, or with a field that it does not have.
    """

    datasets: list[Part] = _as_in_a_recipe("datasets", [])
    streaming: bool = _as_in_a_recipe("streaming", False, "dataset_streaming")
    test_split_size: float | None = _as_in_a_recipe("test_split_size", None, "eval_fraction")

    def __post_init__(self) -> None:
        values, faults = read_values({"datasets": self.datasets}) if self.datasets else ({}, {})
        refuse(Refusal(f"`{name}`", fault) for name, fault in faults.items())
        self.datasets = values.get("datasets", [])


class TrlParser(HfArgumentParser):
    """A command line, and a YAML file named by `--config`, into dataclasses.

    Flags win over the file. `env` in the file sets environment variables.

    Example:
        >>> parser = TrlParser((ScriptArguments, ModelConfig))
        >>> data, model = parser.parse_args_and_config(["--dataset_name", "pairs.jsonl", "--lora_r", "4"])
        >>> data.dataset_name, model.lora_r
        ('pairs.jsonl', 4)
    """

    def parse_args_and_config(
        self,
        args: Iterable[str] | None = None,
        return_remaining_strings: bool = False,
        fail_with_unknown_args: bool = True,
        separate_remaining_strings: bool = False,
    ) -> tuple[Any, ...]:
        """One instance of each dataclass.

        Args:
            args: The words of the command line; by default this process's.
            return_remaining_strings: Also return the words that no dataclass has a field for, as a list.
            fail_with_unknown_args: Refuse a line of the file that no dataclass has a field for.
            separate_remaining_strings: Return those of the file and of the command line as two lists.

        Raises:
            ConfigurationError: For unknown names, all of them, with what each is called today; and for a file that is
                not a YAML mapping.
        """
        words = list(sys.argv[1:] if args is None else args)
        unknown = self._set_defaults(_read_config(words))
        if not return_remaining_strings:  # argparse would take a short name for the start of others, and exit
            refuse(self._refused((flag for flag in _flags_of(words) if flag in SYNONYMS), "--"))
        *parsed, left = self.parse_args_into_dataclasses(args=words, return_remaining_strings=True)
        if not return_remaining_strings:
            flags = _flags_of(left)
            refuse([*self._refused(unknown if fail_with_unknown_args else ()), *self._refused(flags or left, "--")])
            return tuple(parsed)
        of_file = [word for name, value in unknown.items() for word in (f"--{name}", str(value))]
        return (*parsed, of_file, left) if separate_remaining_strings else (*parsed, of_file + left)

    def _set_defaults(self, config: dict[str, Any]) -> dict[str, Any]:
        """Takes a file's values for defaults; those that no field has."""
        for action in self._actions:
            if action.dest in config:
                action.default, action.required = config.pop(action.dest), False
        return config

    def _refused(self, names: Iterable[str], dashes: str = "") -> Iterator[Refusal]:
        """Names that no field has; with dashes, our options are spelled as flags."""
        known = {action.dest for action in self._actions if action.dest.isidentifier()}
        of = inspect.Parameter.KEYWORD_ONLY
        signature = inspect.Signature([inspect.Parameter(name, of) for name in sorted(known)])
        for one in refused_names(dict.fromkeys(names), signature):
            flag = re.sub(r"`(\w+)`", lambda found: f"`{dashes * (found[1] in known)}{found[1]}`", one.instead)
            yield replace(one, instead=flag)


def _flags_of(words: Iterable[str]) -> list[str]:
    return [word[2:].partition("=")[0] for word in words if word.startswith("--")]


def _read_config(words: list[str]) -> dict[str, Any]:
    """The file that `--config` names, which is taken out of the words; sets the variables of its `env`."""
    for place, word in enumerate(words):
        if word == "--config" and place + 1 < len(words):
            path = Path(words.pop(place + 1))
        elif word.startswith("--config="):
            path = Path(word.partition("=")[2])
        else:
            continue
        words.pop(place)
        config: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        environment = config.pop("env", {}) if isinstance(config, dict) else None
        if not isinstance(environment, dict):
            raise ConfigurationError(
                problem=f"Cannot use `--config {path}`: options are read from a YAML mapping, and so is its `env`.",
                instead="Write a line `name: value` for each option.",
            )
        os.environ.update({name: str(value) for name, value in environment.items()})
        return dict(config)
    return {}


def adapter_of(options: ModelConfig | ScriptOptions) -> Any:
    """The LoRA adapter of these options, which have its rank."""
    assert options.lora_r is not None
    further = {
        "target_parameters": options.lora_target_parameters,
        "modules_to_save": options.lora_modules_to_save,
        "use_rslora": options.use_rslora or None,
        "use_dora": options.use_dora or None,
    }
    return lora_config(
        options.lora_r,
        alpha=options.lora_alpha,
        dropout=options.lora_dropout or 0.0,
        target_modules=options.lora_target_modules,
        **{name: value for name, value in further.items() if value is not None},
    )


def get_peft_config(model_args: ModelConfig) -> Any:
    """The adapter to train, for `DPOTrainer(peft_config=...)`; None without `use_peft`."""
    return adapter_of(model_args) if model_args.use_peft else None


def get_quantization_config(model_args: ModelConfig) -> BitsAndBytesConfig | None:
    """How to quantize the frozen weights, for `DPOTrainer(quantization_config=...)`; None if they are not.

    Raises:
        MissingPackageError: Without bitsandbytes.
    """
    return quantization_of(model_args)


def get_kbit_device_map() -> dict[str, int] | None:
    """The `device_map` of quantized weights: all on this process's own device; None without one."""
    return {"": PartialState().local_process_index} if torch.accelerator.is_available() else None


def get_dataset(mixture_config: DatasetMixtureConfig) -> DatasetDict:
    """The rows of all parts, as the split `train`; with `test_split_size` the held-out ones as `test`.

    Raises:
        DataError: If a part cannot be read, or its columns have other types than another's.
        ConfigurationError: If there are no parts.
    """
    if not mixture_config.datasets:
        raise ConfigurationError(
            problem="Cannot make a dataset of no `datasets`: nothing would be in it.",
            instead="Name a file, a folder or a dataset on the hub: `datasets=['pairs.jsonl']`.",
        )
    rows: Any = load_mixture(mixture_config.datasets, mixture_config.streaming)
    rows = without_row_numbers(rows) if isinstance(rows, Dataset) else rows
    size = mixture_config.test_split_size
    if size is None:
        return DatasetDict({"train": rows})
    train, test = hold_out(rows, size if size < 1 else size / len(rows), seed=0)
    return DatasetDict({"train": train, "test": test})
