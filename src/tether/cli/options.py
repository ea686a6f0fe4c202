"""What a recipe may say: our script's own options, and the parser that joins them with `DPOConfig`'s.

Knows names, types and help texts; reads no file and builds nothing.
"""

from __future__ import annotations

import argparse
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import HfArgumentParser, TrainingArguments

from tether.cli.refusing_parser import RefusingParser, refuse_unknown
from tether.cli.trl_options import refuse_former_option, take_refused_flags
from tether.cli.values import kinds_of, read_list, read_scalar, reader
from tether.config import DPOConfig


@dataclass(frozen=True)
class ScriptOptions:
    """The options of a recipe that are not `DPOConfig`'s: which model, which data, which adapter, where to go on.

    Attributes: each is explained by its help text below.
    """

    model: str | None = field(
        default=None,
        metadata={"help": "The policy: a folder or a name on the hub.", "aliases": ["--model_name_or_path"]},
    )
    train_data: str | None = field(
        default=None,
        metadata={
            "help": "Pairs to train on: a .json, .jsonl, .csv or .parquet file, a folder of them, or a dataset on the "
            "hub, `owner/name` or `owner/name:split`.",
            "aliases": ["--dataset", "--dataset_name"],
        },
    )
    datasets: list[str] | None = field(
        default=None,
        metadata={"help": "Or several sets as one: paths or names; a recipe may say more of each (docs/recipes.md)."},
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "The configuration of train_data, where a dataset has several."}
    )
    dataset_train_split: str | None = field(
        default=None, metadata={"help": "The split of train_data to train on, or a slice of it. Default: train."}
    )
    dataset_test_split: str | None = field(
        default=None,
        metadata={
            "help": "The split of train_data that is held out. Default: test, where eval_strategy is set and "
            "train_data is no file."
        },
    )
    dataset_streaming: bool = field(
        default=False,
        metadata={"help": "Read the pairs as they are needed; needs max_steps.", "aliases": ["--streaming"]},
    )
    eval_data: str | None = field(default=None, metadata={"help": "Held-out pairs, named in the same way."})
    eval_fraction: float | None = field(
        default=None,
        metadata={
            "help": "Or: the share of the training pairs to hold out; pairs of one prompt stay together.",
            "aliases": ["--test_split_size"],
        },
    )
    split_seed: int = field(
        default=0,
        metadata={"help": "Which pairs eval_fraction holds out; apart from `seed`, so that all seeds share one set."},
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Folder or name of the tokenizer. Default: the one beside the model."}
    )
    resume: str | None = field(
        default=None,
        metadata={
            "help": "Go on from a checkpoint: its folder, or no value for the last one in output_dir.",
            "nargs": "?",
            "const": "true",
        },
    )
    ref_model: str | None = field(
        default=None, metadata={"help": "Another model as the reference: a folder or a name on the hub."}
    )
    model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the policy on the hub. Default: main."}
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Dtype of the policy's weights. Default: float32.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    load_in_8bit: bool = field(default=False, metadata={"help": "Hold the frozen weights in 8 bits (bitsandbytes)."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Hold the frozen weights in 4 bits (QLoRA)."})
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"help": "Which 4 bits.", "choices": ["fp4", "nf4"]})
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "Quantize the 4-bit blocks' scales too."})
    bnb_4bit_quant_storage: str | None = field(
        default=None, metadata={"help": "Dtype of the tensors that 4-bit weights lie in. Default: uint8."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention implementation of the policy, as transformers names them."}
    )
    use_peft: bool | None = field(
        default=None,
        metadata={
            "help": "Train a LoRA adapter as TRL makes it: rank 16, alpha 32, dropout 0.05, unless said.",
            "nargs": "?",
            "const": True,
        },
    )
    lora_r: int | None = field(
        default=None, metadata={"help": "Train a LoRA adapter of this rank instead of the model's own weights."}
    )
    lora_alpha: float | None = field(
        default=None,
        metadata={"help": "Its scale: the update is multiplied by lora_alpha / lora_r. Default: 2 lora_r."},
    )
    lora_dropout: float | None = field(
        default=None, metadata={"help": "Dropout in front of it; needs disable_dropout=false. Default: 0."}
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Layers that get one, or `all-linear`. Default: what PEFT takes for the model's family."},
    )
    lora_target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Parameters that get one, for weights that are no layers of their own."}
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Layers that train as a whole beside it."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale it by lora_alpha / sqrt(lora_r) instead."})
    use_dora: bool = field(default=False, metadata={"help": "Train the magnitude of each weight's rows too (DoRA)."})


REFERENCE_TABLE = """\
Which reference? The policy is pulled back towards it; it is the policy as it was at the start,
unless ref_model names another.

  options                              reference                            costs
  (none)                               a frozen copy of the policy          a second set of weights, a
                                                                            reference pass in every step
  lora_r, or a model with an adapter   the model's own base, adapter off    no weights, the pass
  precompute_ref_log_probs             any static one, scored once before   one pass over the data, ever:
                                       training and kept on disk            later runs find the answers
  sync_ref_model                       a copy that follows the policy       a second set of what trains,
                                       (TR-DPO)                             the pass
"""

_LORA = (
    "use_peft lora_r lora_alpha lora_dropout lora_target_modules lora_target_parameters lora_modules_to_save "
    "use_rslora use_dora"
)

# Headings of --help, in order, with the options under each; the last takes what is transformers' and named by none.
_REST = "everything else (of transformers.TrainingArguments)"
_GROUPS: Mapping[str, tuple[str | None, str]] = {
    "what to train, and on what": (
        None,
        "recipe config model train_data datasets dataset_config dataset_train_split eval_data eval_fraction "
        "dataset_test_split split_seed dataset_streaming output_dir tokenizer resume max_length truncation_mode "
        "bad_rows dataset_num_proc model_revision dtype load_in_8bit load_in_4bit bnb_4bit_quant_type "
        "use_bnb_nested_quant bnb_4bit_quant_storage attn_implementation model_init_kwargs trust_remote_code",
    ),
    "how to train": (
        None,
        "beta loss_type loss_weights label_smoothing f_divergence_type f_alpha_divergence_coef ld_alpha discopop_tau "
        "use_weighting bco_reward_shift router_aux_loss_coef learning_rate lr_scheduler_type warmup_steps "
        "num_train_epochs max_steps per_device_train_batch_size max_tokens_per_micro_batch "
        "gradient_accumulation_steps seed bf16 gradient_checkpointing disable_dropout",
    ),
    "LoRA": (None, _LORA),
    "the reference": (
        REFERENCE_TABLE,
        "ref_model precompute_ref_log_probs precompute_ref_batch_size ref_store ref_store_mode sync_ref_model "
        "ref_model_mixup_alpha ref_model_sync_steps ref_model_sync_rank ref_dtype reference_free",
    ),
    "when to say, evaluate and save something": (
        None,
        "logging_steps eval_strategy eval_steps per_device_eval_batch_size save_strategy save_steps save_total_limit "
        "report_to run_name disable_tqdm",
    ),
    _REST: (None, ""),
}
_GROUP_OF = {name: title for title, (_, names) in _GROUPS.items() for name in names.split()}
_RANK = {name: rank for rank, name in enumerate(_GROUP_OF)}
_TYPE_NAMES = {int: "INT", float: "FLOAT", str: "TEXT"}


class RecipeParser(RefusingParser, HfArgumentParser):
    """The flags of `tether train` and `tether precompute`: one for each option of a recipe.

    Attributes:
        options: Every option by each of its names: the argparse action that knows how its text is read.
        hints: The type of every option.
    """

    hint = "The recipe comes first, then `--option value`. "

    def __init__(self, verb: str, about: str) -> None:
        self.options: dict[str, argparse.Action] = {}
        self.hints = typing.get_type_hints(ScriptOptions) | typing.get_type_hints(DPOConfig)
        self._plain = {entry.name: entry.default for entry in (*fields(ScriptOptions), *fields(DPOConfig))}
        self._headings: dict[str, Any] = {}
        options: Any = [ScriptOptions, DPOConfig]  # HfArgumentParser's own annotation admits no class
        super().__init__(
            options,
            prog=f"tether {verb}",
            usage=f"tether {verb} [RECIPE.yaml] [--option value ...]",
            description=about,
            formatter_class=_Formatter,
            allow_abbrev=False,
        )
        self.add_argument("recipe", nargs="?", metavar="RECIPE.yaml", help="YAML file: option: value. Flags win.")
        self.add_argument("--config", metavar="RECIPE.yaml", help="The same, as a flag.")
        self.add_argument("--traceback", action="store_true", help="Show where an error was raised.")
        for heading in self._headings.values():
            heading._group_actions.sort(key=lambda action: _RANK.get(action.dest, len(_RANK)))

    def add_argument(self, *names: Any, **settings: Any) -> Any:
        """Puts an option under its heading, and shortens what --help says of it."""
        name = str(names[0]).lstrip("-")
        if name in ("h", "traceback"):
            return super().add_argument(*names, **settings)
        if name.startswith("no_") and "dest" in settings:  # the complement of a flag that is on
            return self._heading(settings["dest"]).add_argument(*names, **settings | {"help": argparse.SUPPRESS})
        hint = self.hints.get(name)
        if bool in kinds_of(hint):  # HfArgumentParser asks for a word where None is a value too
            settings = {"nargs": "?", "const": True} | settings
        elif name == "resume_from_checkpoint":
            settings = {"nargs": "?", "const": "true"} | settings
        settings["type"] = reader(name, settings.get("type", str), hint)
        settings["help"] = _first_sentence(settings.get("help") or "", settings.get("default"))
        if "metavar" not in settings and not 0 < len(settings.get("choices", ())) < 8:  # more would fill the page
            settings["metavar"] = _type_name(self.hints[name])
        action = self._heading(name).add_argument(*names, **settings)
        if name in self.hints:
            for spelling in names:
                self.options[spelling.lstrip("-").replace("-", "_")] = action
        return action

    def parse_given(self, argv: Sequence[str]) -> dict[str, Any]:
        """The options that the command line gives, and no others.

        Raises:
            ConfigurationError: For a word that is no option, or a value that cannot be read.
        """
        argv = take_refused_flags(argv, self.prog)
        unset = object()
        namespace = argparse.Namespace(**{action.dest: unset for action in self.options.values()})
        known, unknown = self.parse_known_args(argv, namespace)
        for word in unknown:
            if word.startswith("--"):
                name = word.lstrip("-").partition("=")[0].replace("-", "_")
                refuse_former_option(name, f"`{word}` after `{self.prog}`")
                refuse_unknown(f"`{word}` after `{self.prog}`", name, self.options, self.prog, dashes="--")
        if unknown:
            self.error(f"`{unknown[0]}` belongs to no option")
        return {name: value for name, value in vars(known).items() if value is not unset and name != "traceback"}

    def read_value(self, name: str, value: Any) -> Any:
        """What a recipe says of an option, in the option's own type.

        Raises:
            ValueError: If it cannot be read; says why.
        """
        action = self.options[name]
        if action.dest == "datasets":  # its entries are paths, or options of their own
            return read_list(value)
        kinds = {typing.get_origin(kind) or kind for kind in kinds_of(self.hints[action.dest])}
        if value is not None and value == self._plain[action.dest]:
            return value  # as transformers wrote it: `debug: ""` is no list of what may be debugged, and a default
        if value is None:
            if types.NoneType not in kinds:
                raise ValueError("It needs a value")
            return None
        if isinstance(value, dict) or (isinstance(value, list) and action.nargs != "+"):
            if type(value) not in kinds:
                raise ValueError(f"It takes one {_type_name(self.hints[action.dest])}, not a {type(value).__name__}")
            return value
        if action.nargs != "+":
            return read_scalar(action, value)
        return [read_scalar(action, entry) for entry in (value if isinstance(value, list) else [value])]

    def _heading(self, name: str) -> Any:
        if not self._headings:
            self._headings = {
                title: self.add_argument_group(title, description) for title, (description, _) in _GROUPS.items()
            }
        own = name not in option_names(TrainingArguments)
        return self._headings[_GROUP_OF.get(name, "how to train" if own else _REST)]


def option_names(options: type) -> set[str]:
    """The names of a dataclass's options."""
    return {entry.name for entry in fields(options) if entry.init}


def _type_name(hint: Any) -> str:
    kinds = [kind for kind in kinds_of(hint) if kind is not types.NoneType]
    inner = typing.get_args(kinds[0])
    if bool in kinds:
        return "BOOL"
    if typing.get_origin(kinds[0]) is dict:
        return "JSON"
    return _TYPE_NAMES.get(inner[0] if inner else kinds[0], "TEXT")


def _first_sentence(text: str, default: Any) -> str:
    first, stop, rest = " ".join(text.split()).partition(". ")
    short = first + stop.strip()
    if rest.startswith("Default:"):
        short = f"{short} {rest}"
    if default is None or default is False or default in ("", [], argparse.SUPPRESS) or "Default:" in short:
        return short
    shown = " ".join(map(str, default)) if isinstance(default, list) else str(getattr(default, "value", default))
    return f"{short} [{shown}]"


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """One spelling of each option, and room for its name."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=38, width=108)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if len(action.option_strings) < 2 or action.option_strings[0] == "-h":
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{action.option_strings[0]} {value}".strip()
