"""The model card: what was trained, with which loss, and against which reference.

Writes Markdown from a run's options and its reference's identity; knows no model and no training.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from tether.config import DPOConfig
from tether.reference import ReferenceIdentity

DPO_PAPER = "2305.18290"
_REFERENCE_PAPERS = {"moving": "2404.09656", "following": "2508.00180"}
_REFERENCES = {
    "frozen": "weights that stand still",
    "adapter": "the policy's own base, with its adapter off or as it started",
    "moving": "weights that follow the policy (TR-DPO)",
    "following": "weights that follow an average of the policy's (BEMA)",
    "uniform": "none, so that every response is as likely as any other",
}
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


@dataclass(frozen=True)
class CardFacts:
    """What a card says.

    Attributes:
        model_name: The model's name.
        base_model: Name of the model it was trained from, on the hub; None if it has none there.
        hub_model_id: Where it will be found; None if it is not pushed.
        dataset_name: The data's name on the hub.
        tags: Tags of the card.
        losses: Name -> function of the losses that were added up.
        reference: Who the reference is.
        options: Option -> value, for the table.
        links: Name -> address of trackers of the run.
    """

    model_name: str
    base_model: str | None
    hub_model_id: str | None
    dataset_name: str | None
    tags: Sequence[str]
    losses: Mapping[str, Callable[..., Any]]
    reference: ReferenceIdentity
    options: Mapping[str, Any]
    links: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_run(
        cls,
        args: DPOConfig,
        reference: ReferenceIdentity,
        losses: Mapping[str, Callable[..., Any]],
        *,
        base_model: str | None,
        own_tags: Sequence[str],
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | Iterable[str] | None = None,
    ) -> CardFacts:
        """The facts of a run from its options; the rest is what a user may add."""
        return cls(
            model_name=model_name or (args.hub_model_id or Path(str(args.output_dir)).name).rsplit("/", 1)[-1],
            base_model=base_model,
            hub_model_id=args.hub_model_id,
            dataset_name=dataset_name,
            tags=_merged_tags(tags, own_tags),
            losses=losses,
            reference=reference,
            options={name: getattr(args, name) for name in (*_OPTIONS, *_changed_options(args))},
            links=_tracker_links(),
        )


def model_card(facts: CardFacts) -> str:
    """The card as Markdown with its front matter."""
    papers = _papers(facts)
    parts = (
        _front_matter(facts),
        f"# Model card for {facts.model_name}",
        _lead(facts),
        "## Quick start",
        _quick_start(facts.hub_model_id or facts.model_name),
        "## Training procedure",
        _procedure(facts),
        "### The reference",
        _reference(facts.reference),
        "### Options",
        _table(facts.options),
        *(f"[{name}]({address})" for name, address in facts.links.items()),
        "### Framework versions",
        "\n".join(f"- {name}: {_version(name)}" for name in _LIBRARIES),
        "## Citations",
        "\n\n".join(_citation(paper) for paper in papers),
    )
    return "\n\n".join(parts) + "\n"


def write_model_card(facts: CardFacts, folder: Path) -> None:
    """Writes the card to `folder/README.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(model_card(facts), encoding="utf-8")


_OPTIONS = ("beta", "label_smoothing", "learning_rate", "max_length", "seed")
_OPTIONS_OF_LOSSES = (
    "loss_weights",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "ld_alpha",
    "discopop_tau",
    "use_weighting",
    "bco_reward_shift",
)  # said where they are not the default
_LIBRARIES = ("tether", "transformers", "torch", "peft", "datasets", "tokenizers")


def _changed_options(args: DPOConfig) -> list[str]:
    plain = {entry.name: entry.default for entry in fields(args)}
    return [name for name in _OPTIONS_OF_LOSSES if getattr(args, name) != plain[name]]


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:  # run from its folder, without an install
        return "unknown"


def _merged_tags(given: str | Iterable[str] | None, own: Sequence[str]) -> list[str]:
    """The user's tags and our own, each once, in a fixed order."""
    users = [given] if isinstance(given, str) else list(given or ())
    return list(dict.fromkeys(["generated_from_trainer", *own, *users]))


def _tracker_links() -> dict[str, str]:
    """Addresses of the run on trackers that are open in this process."""
    wandb = sys.modules.get("wandb")
    run = getattr(wandb, "run", None)
    return {"Weights & Biases": run.url} if run is not None and run.url else {}


def _front_matter(facts: CardFacts) -> str:
    entries = {
        "base_model": facts.base_model,
        "datasets": facts.dataset_name,
        "library_name": "transformers",
        "model_name": facts.model_name,
        "tags": list(facts.tags),
    }
    kept = {name: value for name, value in entries.items() if value is not None}
    return f"---\n{yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)}---"


def _lead(facts: CardFacts) -> str:
    start = f"[{facts.base_model}](https://huggingface.co/{facts.base_model})" if facts.base_model else "a local model"
    name = facts.dataset_name
    data = f" on [{name}](https://huggingface.co/datasets/{name})" if name else ""
    return f"This model was trained from {start}{data}, on preference pairs, with Tether."


def _quick_start(name: str) -> str:
    return f"""\
```python
from transformers import pipeline

generator = pipeline("text-generation", model="{name}")
messages = [{{"role": "user", "content": "What makes a good question?"}}]
print(generator(messages, max_new_tokens=128, return_full_text=False)[0]["generated_text"])
```"""


def _procedure(facts: CardFacts) -> str:
    losses = "; ".join(f"`{name}` ({_links(_papers_of(loss)) or 'own'})" for name, loss in facts.losses.items())
    return f"Direct Preference Optimization ({_links([DPO_PAPER])}) with the loss {losses}."


def _reference(reference: ReferenceIdentity) -> str:
    about = _REFERENCES.get(reference.kind)
    lead = "The policy was trained against this reference" + (f": {about}." if about else ".")
    return f"{lead}\n\n{_table({**reference.describe(), 'digest': reference.digest})}"


def _table(values: Mapping[str, Any]) -> str:
    rows = "\n".join(f"| {name} | `{value}` |" for name, value in values.items())
    return f"| | |\n| --- | --- |\n{rows}"


def _papers(facts: CardFacts) -> list[str]:
    papers = [DPO_PAPER, *(paper for loss in facts.losses.values() for paper in _papers_of(loss))]
    papers.append(_REFERENCE_PAPERS.get(facts.reference.kind, DPO_PAPER))
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
