"""The names of a row's columns: ours, and those that published sets have instead.

Knows names only: which columns of a set are read is the user's to say, with the option `columns`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from tether.refusals import nearest_to

# What `columns` maps; TRL's names, and `system`, which is read only if it is named there.
MAPPED = ("prompt", "chosen", "rejected", "system", "tools", "chat_template_kwargs")
SYSTEM_COLUMN = "tether_system"  # the system message, once `columns` named its column
_PAIR = ("prompt", "chosen", "rejected")
# In the order of preference; `messages` is a whole conversation with the chosen answer where there is no `chosen`.
_USUAL: Mapping[str, tuple[str, ...]] = {
    "chosen": (
        "preferred",
        "preferred_response",
        "chosen_response",
        "response_chosen",
        "chosen_answer",
        "answer_chosen",
        "chosen_messages",
        "accepted",
        "winner",
        "positive",
        "messages",
    ),
    "rejected": (
        "dispreferred",
        "dispreferred_response",
        "non_preferred",
        "rejected_response",
        "response_rejected",
        "rejected_answer",
        "answer_rejected",
        "rejected_messages",
        "loser",
        "negative",
    ),
    "prompt": ("question", "instruction", "query", "input", "conversations", "conversation", "messages"),
    "system": ("system", "system_prompt"),
}


def columns_meant(names: Iterable[str]) -> dict[str, str | list[str]]:
    """What `columns` would have to be for a set with these columns, ours: theirs; empty where none is known."""
    own = list(names)
    found: dict[str, str | list[str]] = {}
    for ours in (one for one in ("chosen", "rejected", "prompt") if one not in own):
        left = [one for one in own if one not in found.values() and one not in _PAIR]
        near = next((one for one in _USUAL[ours] if one in left), "") or _near(ours, left)
        if near:
            found[ours] = near
    if found.get("prompt") == "instruction" and "input" in own:
        found["prompt"] = ["instruction", "input"]
    if found.get("chosen") == "messages":
        found.pop("prompt", None)  # the conversation begins with it
    elif "prompt" in found and (system := next((one for one in _USUAL["system"] if one in own), "")):
        found = {"system": system, **found}
    return {ours: found[ours] for ours in MAPPED if ours in found}


def how_to_map(columns: Mapping[str, Any]) -> str:
    """What to write for columns under other names, in Python and in a recipe."""
    in_recipe = yaml.safe_dump(dict(columns), default_flow_style=True, sort_keys=False, width=1000).strip()
    return f"Write `columns={json.dumps(columns)}` (in a recipe, `columns: {in_recipe}`)."


def _near(column: str, names: list[str]) -> str:
    """The column that was probably meant: spelled otherwise, or with more words."""
    lower = {name.lower(): name for name in names}
    return lower.get(nearest_to(column, lower)) or next((name for low, name in lower.items() if column in low), "")
