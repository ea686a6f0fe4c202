"""Reports on one or several runs as a self-contained HTML page: tables and curves.

Takes what every trainer keeps (`trainer.state.log_history`) and text; knows no model, no reference and no task. All
markup is in `page.html.jinja`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tether.report.charts import draw_lines, draw_sample

LogHistory = Sequence[Mapping[str, Any]]
"""What `trainer.state.log_history` holds: dicts with `step` and metrics."""

_MAX_POINTS = 12_000  # of all curves of all runs: a page of less than 1 MB
_NUMBER = re.compile(r"[–—−+-]?(\d[\d .,:%±→×+−-]*[A-Za-zµ]{0,4})?")  # or a dash or nothing in place of one
_LONG = 40  # characters
_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: Heading above the table.
        columns: Heading of each column; a line break separates name and unit.
        rows: The cells, each row as long as `columns`. Texts may be long; their line breaks are kept.
        notes: Sentences below the table.
        folded: Collapsed until the reader opens it.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    folded: bool = False

    @property
    def kinds(self) -> list[str]:
        """Of each column: "number", "text" where a cell is long, or "label".

        Raises:
            ValueError: A row is not as long as `columns`.
        """
        return [_kind(cells) for _, *cells in zip(self.columns, *self.rows, strict=True)]


@dataclass(frozen=True)
class Curve:
    """A metric to draw over the steps of the runs.

    Attributes:
        key: Its name in the log.
        title: Its name on the page.
        unit: Unit of the vertical axis.
        about: One sentence for the reader, also the figure's description.
        baseline: Value of a model without information; drawn as a thin line.
    """

    key: str
    title: str
    unit: str
    about: str
    baseline: float | None = None


DPO_CURVES = (
    Curve("loss", "Loss", "nats", "Mean loss of the pairs since the last point; ln 2 is no preference.", 0.6931),
    Curve(
        "rewards/margins",
        "Reward margin",
        "β × nats",
        "Reward of the chosen response minus that of the rejected one; the reward is β log(policy / reference).",
        0.0,
    ),
    Curve(
        "rewards/chosen",
        "Reward of the chosen response",
        "β × nats",
        "It falls below 0 when the policy makes even the chosen responses less likely.",
        0.0,
    ),
    Curve(
        "rewards/accuracies",
        "Reward accuracy",
        "share of pairs",
        "How often the chosen response of a training pair has the higher reward; at the very start both rewards are 0.",
        0.5,
    ),
    Curve(
        "mean_token_accuracy",
        "Token accuracy",
        "share of tokens",
        "How many tokens of the chosen responses the policy ranks first.",
    ),
    Curve(
        "reference/distance",
        "Reference to policy",
        "nats per token",
        "How far a synchronized reference is from the policy on fixed pairs; a sync brings it back.",
        0.0,
    ),
    Curve(
        "reference/distance_from_start",
        "Reference to its start",
        "nats per token",
        "How far a synchronized reference has moved from the initial policy, on the same pairs.",
        0.0,
    ),
    Curve(
        "samples/surprise",
        "Surprise of held-out answers",
        "nats per token",
        "Of greedy answers under the reference; at twice the first value they are hardly language.",
    ),
    Curve(
        "samples/kl",
        "KL of held-out answers",
        "nats per token",
        "Mean of log(policy / reference) over sampled answers; near 1 the policy is ruined, whatever the loss.",
        0.0,
    ),
    Curve("samples/length", "Length of held-out answers", "tokens", "Mean length of the policy's greedy answers."),
)


def write_report(
    path: str | Path,
    *,
    title: str,
    lead: Sequence[str],
    tables: Sequence[Table],
    runs: Mapping[str, LogHistory],
    further: Sequence[Table] = (),
    curves: Sequence[Curve] = DPO_CURVES,
) -> Path:
    """Writes the page.

    Args:
        path: The file to write.
        title: Title of the page.
        lead: Paragraphs at the top.
        tables: Tables before the curves.
        runs: Name -> log; one look each, in this order. Where there are too many points to draw, neighbours are
            averaged.
        further: Tables after the curves.
        curves: The curves to draw. One that no run logged is omitted.

    Returns:
        The path.
    """
    drawn = [curve for curve in curves if any(curve.key in entry for log in runs.values() for entry in log)]
    limit = max(1, _MAX_POINTS // max(1, len(drawn) * len(runs)))
    points = {name: {curve.key: _points(log, curve.key, limit) for curve in drawn} for name, log in runs.items()}
    page = _TEMPLATES.get_template("page.html.jinja").render(
        title=title,
        lead=lead,
        tables=tables,
        legend=[(name, draw_sample(place)) for place, name in enumerate(runs)],
        figures=[(c, draw_lines([of[c.key] for of in points.values()], c.unit, c.baseline, c.key)) for c in drawn],
        further=further,
        points=points,
    )
    Path(path).write_text(page, encoding="utf-8")
    return Path(path)


def _points(log: LogHistory, key: str, limit: int) -> dict[str, list[float]]:
    """The steps and values of a metric, averaged over as many neighbours as bring their number below the limit."""
    entries = [(entry["step"], entry[key]) for entry in log if key in entry and math.isfinite(entry[key])]
    size = math.ceil(len(entries) / limit) or 1
    parts = [entries[start : start + size] for start in range(0, len(entries), size)]
    return {
        "step": [part[-1][0] for part in parts],
        "value": [float(f"{fmean(value for _, value in part):.6g}") for part in parts],
    }


def _kind(cells: Sequence[str]) -> str:
    if all(map(_NUMBER.fullmatch, cells)):
        return "number"
    return "text" if any(len(cell) > _LONG or "\n" in cell for cell in cells) else "label"
