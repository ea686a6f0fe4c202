"""The model card: what was trained, with which loss, and against which reference.

Fills `model_card_template.md` from what a trainer has; changes nothing of it.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from datasets import Dataset
from huggingface_hub import ModelCard, ModelCardData
from transformers import ProcessorMixin

from tether.config.dpo_config import DPOConfig
from tether.models.loading import hub_name
from tether.reference.adapter_tensors import is_adapter_model
from tether.reference.base import Kind

if TYPE_CHECKING:
    pass

DPO_PAPER = "2305.18290"
_TITLES = {
    DPO_PAPER: (
        "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
        "Rafailov, Rafael and Sharma, Archit and Mitchell, Eric and Ermon, Stefano and Manning, Christopher D. and "
        "Finn, Chelsea",
        2023,
    ),
    "2404.09656": (
        "Learn Your Reference Model for Real Good Alignment",
        "Gorbatovski, Alexey and Shaposhnikov, Boris and Malakhov, Alexey and Surnachev, Nikita and "
        "Aksenov, Yaroslav and Maksimov, Ian and Balagansky, Nikita and Gavrilov, Daniil",
        2024,
    ),
    "2508.00180": (
        "EMA Without the Lag: Bias-Corrected Iterate Averaging Schemes",
        "Block, Adam and Zhang, Cyril",
        2025,
    ),
}


def write_model_card(
    trainer: Any,
    folder: Path,
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: str | Iterable[str] | None = None,
) -> None:
    """Writes the card of a run to `folder/README.md`.

    Args:
        trainer: The run.
        folder: Where its model is.
        model_name: The model's name; by default that on the hub, or the folder's.
        dataset_name: The data's name on the hub.
        tags: Further tags.
    """
    hub_model_id = getattr(trainer, "hub_model_id", None) or trainer.args.hub_model_id
    base_model = hub_name(trainer.model)
    name = model_name or (hub_model_id or folder.resolve().name).rsplit("/", 1)[-1]
    data = ModelCardData(
        base_model=base_model,
        datasets=dataset_name,
        library_name="transformers",
        model_name=name,
        tags=_merged_tags(tags, trainer._tag_names),
    )
    pairs = trainer.train_dataset
    card = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("model_card_template.md")),
        name=_text(name),
        start=_hub_link(base_model, "") if base_model else "a local model",
        data=f" of {_hub_link(dataset_name, 'datasets/')}" if dataset_name else "",
        num_pairs=f"{len(pairs):,}" if isinstance(pairs, Dataset) else "",
        address=json.dumps(hub_model_id or "."),
        where="" if hub_model_id else "  # the folder of this file",
        chats=getattr(trainer.processing_class, "chat_template", None) is not None,
        reads_images=isinstance(trainer.processing_class, ProcessorMixin),
        dpo=_links([DPO_PAPER]),
        links=", ".join(f"[{name}]({quote(url, safe=_OF_ADDRESSES)})" for name, url in _tracker_links().items()),
        **_reference_and_losses(trainer.reference, trainer._objective.functions),
        options=_cells(_options_of_run(trainer.args)),
        adapter=_cells(_options_of_adapter(trainer.model)),
        versions=_cells({library: _version(library) for library in _LIBRARIES}),
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(str(card), encoding="utf-8")


def _reference_and_losses(reference: Any, losses: Mapping[str, Any]) -> dict[str, Any]:
    """What the card says of the reference and of the losses, with what to cite for both."""
    identity, kind = reference.identity, reference.kind
    return {
        "losses": "; ".join(f"{_code(name)} ({_links(_papers_of(loss)) or 'own'})" for name, loss in losses.items()),
        "about_reference": kind.description,
        "reference": _cells({**identity.describe(), "kind": kind.name, "digest": identity.digest}),
        "citations": [_citation(paper) for paper in _papers(kind, losses)],
    }


# fmt: off
_OPTIONS = (
    "beta", "label_smoothing", "max_length", "learning_rate", "lr_scheduler_type", "warmup_steps", "optim",
    "weight_decay", "max_grad_norm", "seed",
)
_SAID_IF_CHANGED = (
    "loss_weights", "f_divergence_type", "f_alpha_divergence_coef", "ld_alpha", "discopop_tau", "use_weighting",
    "bco_reward_shift", "max_tokens_per_micro_batch",
)
_OF_NO_INTEREST = (
    "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version",
    "runtime_config", "lora_bias",
)
# fmt: on
_LIBRARIES = ("tether", "transformers", "torch", "peft", "datasets", "tokenizers")
_OF_ADDRESSES = ":/?&=%#@+,;~-._"


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:  # run from its folder, without an install
        return "unknown"


def _merged_tags(given: str | Iterable[str] | None, own: Sequence[str]) -> list[str]:
    """The user's tags and our own, each once, in a fixed order."""
    users = [given] if isinstance(given, str) else list(given or ())
    return list(dict.fromkeys(["generated_from_trainer", *own, *users]))


def _options_of_run(args: DPOConfig) -> dict[str, Any]:
    """What shaped a run: its loss, batches and schedule; a loss's further options where they are not the default."""
    plain = {entry.name: entry.default for entry in fields(args)}
    names = [*_OPTIONS, "max_steps" if args.max_steps > 0 else "num_train_epochs"]
    names += [name for name in _SAID_IF_CHANGED if getattr(args, name) != plain[name]]
    parts = (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size)
    pairs = f"{math.prod(parts)} = {parts[0]} per device × {parts[1]} accumulated × {parts[2]} processes"
    at_most = "at most " if args.max_tokens_per_micro_batch is not None else ""
    return {
        **{name: getattr(args, name) for name in names},
        "pairs of an optimizer step": at_most + pairs,
        "mixed precision": args.mixed_precision,
    }


def _options_of_adapter(model: Any) -> dict[str, Any]:
    """The type of the adapter that trains and what of its options is not the default; nothing for a full model."""
    if not is_adapter_model(model):
        return {}
    config = model.peft_config[model.active_adapter]
    plain = {entry.name: entry.default for entry in fields(config) if entry.name not in _OF_NO_INTEREST}
    values = {name: getattr(config, name) for name in plain}
    told = {
        name: ", ".join(sorted(map(str, value))) if isinstance(value, set | list | tuple) else value
        for name, value in values.items()
        if name in ("r", "lora_alpha") or (value and value != plain[name])
    }
    return {"type": config.peft_type} | told


def _tracker_links() -> dict[str, str]:
    """Addresses of the run on the trackers that are open in this process."""
    wandb, comet, trackio = (sys.modules.get(name) for name in ("wandb", "comet_ml", "trackio"))
    experiment = comet.get_running_experiment() if comet is not None else None
    space = trackio.context_vars.current_space_id.get() if trackio is not None else None
    addresses = {
        "Weights & Biases": getattr(getattr(wandb, "run", None), "url", None),
        "Trackio": f"https://huggingface.co/spaces/{space}" if space else None,
        "Comet": getattr(experiment, "url", None),
    }
    return {name: address for name, address in addresses.items() if address}


def _text(value: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(value.split()))


def _code(value: Any) -> str:
    """A value as code, in a table too."""
    text = " ".join(str(getattr(value, "value", value)).split()).replace("|", "\\|")
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence, space = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{space}{text}{space}{fence}"


def _hub_link(name: str, kind: str) -> str:
    return f"[{_text(name)}](https://huggingface.co/{kind}{quote(name)})"


def _cells(values: Mapping[str, Any]) -> dict[str, str]:
    return {_text(name): _code(value) for name, value in values.items() if value != ""}


def _papers(kind: Kind, losses: Mapping[str, Callable[..., Any]]) -> list[str]:
    papers = [DPO_PAPER, *(paper for loss in losses.values() for paper in _papers_of(loss))]
    papers.append(kind.paper or DPO_PAPER)
    return list(dict.fromkeys(papers))


def _papers_of(loss: Callable[..., Any]) -> list[str]:
    """The papers that a loss names in its docstring."""
    return list(dict.fromkeys(re.findall(r"arXiv[: ](\d{4}\.\d{5})", inspect.getdoc(loss) or "")))


def _links(papers: Iterable[str]) -> str:
    return ", ".join(f"[arXiv {paper}](https://arxiv.org/abs/{paper})" for paper in papers)


def _citation(paper: str) -> str:
    """BibTeX where we know the title, a link where a loss's docstring names the paper only."""
    if paper not in _TITLES:
        return _links([paper])
    title, authors, year = _TITLES[paper]
    key = authors.partition(",")[0].lower() + str(year)
    fields = {"title": f"{{{title}}}", "author": authors, "year": year, "eprint": paper, "archivePrefix": "arXiv"}
    body = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
    return f"```bibtex\n@misc{{{key},\n{body}\n}}\n```"
