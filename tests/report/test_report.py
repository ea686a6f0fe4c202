"""`tether.report`: one page that needs nothing else, says the same for the same input, and hides nothing."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tether.report import DPO_CURVES, Curve, Table, write_report

MOVING = {"reference/distance": 0.1, "reference/distance_from_start": 0.2, "reference/syncs": 3}
SAMPLED = {"samples/surprise": 2.0, "samples/kl": 0.1, "samples/length": 12.0}
RUNS: dict[str, list[dict[str, Any]]] = {
    name: [
        {"step": step, "loss": 0.6931 - slope * step, "rewards/margins": slope * step, "rewards/accuracies": 0.5}
        | {"rewards/chosen": -slope * step, "mean_token_accuracy": 0.7}
        | (MOVING if name == "synchronized" else {})
        for step in range(1, 11)
    ]
    + [{"step": 10} | SAMPLED, {"step": 10, "train_runtime": 1.0}]  # the closing entry has no metric of ours
    for name, slope in (("explicit", 0.01), ("precomputed", 0.01), ("synchronized", 0.02))
}
TABLE = Table("Numbers", ["reference", "bytes\nof weights"], [["explicit", "1,024"], ["a < b & c", "0"]], ["A note."])
NEVER_CLOSED = {"meta", "link", "br", "hr", "img", "input"}


def page(path: Path, **changed: Any) -> str:
    arguments: dict[str, Any] = {"title": "T", "lead": ["P"], "tables": [TABLE], "runs": RUNS}
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
    assert len(Elements(page(tmp_path)).of("figure")) == len(DPO_CURVES)


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
    names = [a["aria-label"] for a in Elements(text).of("div") if a.get("role") == "img"]
    assert len(names) == len(DPO_CURVES) and all(names)
    assert all(f">{curve.unit}</text>" in text for curve in DPO_CURVES)
    assert text.count("optimizer step") == len(DPO_CURVES)
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
    assert numbers["synchronized"]["loss"]["step"] == [entry["step"] for entry in log]
    assert numbers["synchronized"]["loss"]["value"] == pytest.approx([entry["loss"] for entry in log], rel=1e-5)


def test_report_shows_tables_as_given(tmp_path: Path) -> None:
    text = page(tmp_path, further=[Table("More", ["a", "b"], [["x", "y"]], folded=True)])
    assert "a &lt; b &amp; c" in text and "a < b & c" not in text
    assert '<td class="number">1,024</td>' in text and "<small>of weights</small>" in text and "A note." in text
    assert "<details><summary><h2>More</h2></summary>" in text
    assert text.index("A note.") < text.index("<figure>") < text.index(">More<")


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        (["1,024", "−3", "25.0% → 75.0%", "0.12 ± 0.02", "1.2 GB", "–", ""], "number"),
        (["explicit", "2"], "label"),
        (["3 reasons: it is short", "2 of them"], "label"),
        (["1. A long answer that begins with a number and goes on."], "text"),
        (["Two\nlines"], "text"),
        (["1\n2"], "text"),
    ],
)
def test_report_tells_columns_of_numbers_from_labels_and_texts(cells: list[str], kind: str) -> None:
    assert Table("T", ["name", "column"], [["row", cell] for cell in cells]).kinds[1] == kind


def test_report_shows_a_table_without_rows(tmp_path: Path) -> None:
    assert "<h2>None</h2>" in page(tmp_path, tables=[Table("None", ["a", "b"], [])])


def test_report_cannot_be_broken_by_names(tmp_path: Path) -> None:
    name = '</script><b> "&'
    text = page(tmp_path, title=name, lead=[name], runs={name: RUNS["explicit"]})
    elements = Elements(text)
    assert elements.of("b") == [] and len(elements.of("script")) == 1


def test_report_leaves_out_what_no_run_logged(tmp_path: Path) -> None:
    text = page(tmp_path, runs={"sft": [{"step": 1, "loss": 2.0}]})
    assert "<strong>Loss</strong>" in text and "Reward margin" not in text
    assert "<strong>" not in page(tmp_path, runs={})


def test_report_marks_the_points_of_a_curve_too_short_for_a_line(tmp_path: Path) -> None:
    curve = Curve("x", "X", "nats", "About.")
    drawn = {}
    for count in (1, 2, 3):
        runs = {name: [{"step": step + 1, "x": step} for step in range(count)] for name in ("a", "b")}
        (figure,) = re.findall(r"<figure>.*?</figure>", page(tmp_path, runs=runs, curves=[curve]), flags=re.DOTALL)
        drawn[count] = set(re.findall(r'<path id="m\w+" d="([^"]*)" style="[^"]*(?:#4d8df6|#e8710a)', figure))
    assert [len(markers) for markers in drawn.values()] == [2, 2, 0]  # a circle and a square


def test_report_of_long_runs_stays_below_a_megabyte_and_averages_neighbours(tmp_path: Path) -> None:
    keys = [curve.key for curve in DPO_CURVES]
    log = [{"step": step} | dict.fromkeys(keys, math.sin(step) / 3 + step) for step in range(1, 20_001)]
    text = page(tmp_path, runs={f"run {number}": log for number in range(4)})
    assert len(text.encode()) < 1e6
    found = re.search(r'id="curves">(.*?)</script>', text)
    assert found is not None
    loss = json.loads(found[1])["run 3"]["loss"]
    assert 250 <= len(loss["step"]) <= 300 and loss["step"][-1] == 20_000
    first = loss["step"][0]
    assert loss["value"][0] == pytest.approx(sum(entry["loss"] for entry in log[:first]) / first, rel=1e-5)


def test_report_omits_values_that_are_not_finite(tmp_path: Path) -> None:
    runs = {"a": [{"step": step, "loss": loss} for step, loss in enumerate((1.0, math.nan, math.inf, 2.0))]}
    assert '{"a": {"loss": {"step": [0, 3], "value": [1.0, 2.0]}}}' in page(tmp_path, runs=runs)


def test_report_is_the_same_for_the_same_input(tmp_path: Path) -> None:
    assert page(tmp_path) == page(tmp_path)


def test_report_draws_more_runs_than_it_has_colours(tmp_path: Path) -> None:
    runs = {f"run {number}": RUNS["explicit"] for number in range(20)}
    assert "<li>" in (text := page(tmp_path, runs=runs)) and text.count("<li>") == 20


def test_report_refuses_a_row_that_does_not_fit_its_columns(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        page(tmp_path, tables=[Table("T", ["a", "b"], [["only one"]])])
