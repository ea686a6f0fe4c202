"""`tether.report`: one page that needs nothing else, says the same for the same input, and hides nothing."""

from __future__ import annotations

import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tether.report import DPO_CURVES, Changes, Table, write_report

MOVING = {"reference/distance": 0.1, "reference/distance_from_start": 0.2, "reference/syncs": 3}
RUNS: dict[str, list[dict[str, Any]]] = {
    name: [
        {"step": step, "loss": 0.6931 - slope * step, "rewards/margins": slope * step, "rewards/accuracies": 0.5}
        | (MOVING if name == "synchronized" else {})
        for step in range(1, 11)
    ]
    + [{"step": 10, "train_runtime": 1.0}]  # the closing entry, which has no metric of ours
    for name, slope in (("explicit", 0.01), ("precomputed", 0.01), ("synchronized", 0.02))
}
TABLE = Table("Numbers", ["reference", "bytes\nof weights"], [["explicit", "1,024"], ["a < b & c", "0"]], ["A note."])
CHANGES = Changes("Accuracy", "share", "Before and after.", {name: (0.25, 0.75) for name in RUNS})
NEVER_CLOSED = {"meta", "link", "br", "hr", "img", "input"}


def page(path: Path, **changed: Any) -> str:
    arguments: dict[str, Any] = {"title": "T", "lead": ["P"], "runs": RUNS, "table": TABLE, "changes": CHANGES}
    return write_report(path / "report.html", **(arguments | changed)).read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Every element with its attributes; fails where an end tag does not fit."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in NEVER_CLOSED:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def test_report_is_well_formed(tmp_path: Path) -> None:
    assert len(Elements(page(tmp_path)).of("figure")) == len(DPO_CURVES) + 1


def test_report_needs_no_other_file(tmp_path: Path) -> None:
    elements = Elements(page(tmp_path))
    addresses = [
        value
        for _, attributes in elements.found
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href") and not str(value).startswith("#")
    ]
    assert addresses == [] and elements.of("link") == []
    assert [attributes.get("type") for attributes in elements.of("script")] == ["application/json"]


def test_report_names_no_id_twice(tmp_path: Path) -> None:
    ids = Counter(attributes["id"] for _, attributes in Elements(page(tmp_path)).found if "id" in attributes)
    assert [name for name, count in ids.items() if count > 1] == []


def test_report_pictures_point_only_into_themselves(tmp_path: Path) -> None:
    for svg in re.findall(r"<svg.*?</svg>", page(tmp_path), flags=re.DOTALL):
        wanted = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
        assert wanted <= set(re.findall(r'id="([^"]+)"', svg))


def test_report_pictures_have_a_name_axes_with_units_and_the_colour_of_the_page(tmp_path: Path) -> None:
    text = page(tmp_path)
    names = [a["aria-label"] for a in Elements(text).of("svg") if a.get("role") == "img"]
    assert len(names) == len(DPO_CURVES) + 1 and all(names)
    assert "loss (nats)" in text and "reward margin (β × nats)" in text and text.count("optimizer step") >= 3
    assert "currentColor" in text and "#123456" not in text
    assert "prefers-color-scheme: dark" in text


def test_report_styles_of_pictures_do_not_reach_the_page(tmp_path: Path) -> None:
    assert len(Elements(page(tmp_path)).of("style")) == 1


def test_report_keeps_the_numbers_behind_the_curves(tmp_path: Path) -> None:
    found = re.search(r'<script type="application/json" id="curves">(.*?)</script>', page(tmp_path))
    assert found is not None
    numbers = json.loads(found[1])
    assert list(numbers) == list(RUNS)
    log = [entry for entry in RUNS["synchronized"] if "loss" in entry]
    assert numbers["synchronized"]["loss"] == {
        "step": [entry["step"] for entry in log],
        "value": [entry["loss"] for entry in log],
    }


def test_report_shows_tables_as_given(tmp_path: Path) -> None:
    text = page(tmp_path, further=[Table("More", ["a", "b"], [["x", "y"]], folded=True)])
    assert "a &lt; b &amp; c" in text and "a < b & c" not in text
    assert '<td class="number">1,024</td>' in text and "<small>of weights</small>" in text and "A note." in text
    assert "<details><summary><h2>More</h2></summary>" in text


def test_report_cannot_be_broken_by_names(tmp_path: Path) -> None:
    name = '</script><b> "&'
    text = page(tmp_path, title=name, lead=[name], runs={name: RUNS["explicit"]}, changes=None)
    elements = Elements(text)
    assert elements.of("b") == [] and len(elements.of("script")) == 1


def test_report_leaves_out_what_no_run_logged(tmp_path: Path) -> None:
    text = page(tmp_path, runs={"sft": [{"step": 1, "loss": 2.0}]}, changes=None)
    assert "<strong>Loss</strong>" in text and "Reward margin" not in text
    assert "<strong>" not in page(tmp_path, runs={}, changes=None)


def test_report_is_the_same_for_the_same_input(tmp_path: Path) -> None:
    assert page(tmp_path) == page(tmp_path)


def test_report_draws_more_runs_than_it_has_colours(tmp_path: Path) -> None:
    runs = {f"run {number}": RUNS["explicit"] for number in range(20)}
    assert "<li>" in (text := page(tmp_path, runs=runs, changes=None)) and text.count("<li>") == 20


def test_report_refuses_a_row_that_does_not_fit_its_columns(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        page(tmp_path, table=Table("T", ["a", "b"], [["only one"]]))
