"""Reports on one or several runs as a self-contained HTML page: a table, curves and further tables.

Takes what every trainer keeps (`trainer.state.log_history`) and text; knows no model, no reference and no task. The
only file that draws. Figures are inline SVG whose text and axes take the page's colour, so that the page is readable
in light and dark mode.
"""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from string import Template
from typing import Any

from tether.errors import MissingPackageError

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
except ImportError as error:
    raise MissingPackageError(
        problem="Cannot draw a report: matplotlib, which draws its curves, is not installed.",
        details="Only reports and `tether demo` draw, so a plain install does not include matplotlib.",
        instead="Install it: `pip install matplotlib`, or `pip install '.[demo]'` in a clone of Tether.",
    ) from error

LogHistory = Sequence[Mapping[str, Any]]
"""What `trainer.state.log_history` holds: dicts with `step` and metrics."""


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: Heading above the table.
        columns: Heading of each column; a line break separates name and unit.
        rows: The cells, each row as long as `columns`.
        notes: Sentences below the table.
        folded: Collapsed until the reader opens it.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    folded: bool = False


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


@dataclass(frozen=True)
class Changes:
    """A number of each run before and after, drawn as one line per run.

    Attributes:
        title: What the number is.
        unit: Unit of the horizontal axis.
        about: One sentence for the reader, also the figure's description.
        values: Run -> (before, after).
    """

    title: str
    unit: str
    about: str
    values: Mapping[str, tuple[float, float]]


DPO_CURVES = (
    Curve("loss", "Loss", "nats", "Mean loss of the pairs since the last point; ln 2 is no preference.", 0.6931),
    Curve(
        "rewards/margins",
        "Reward margin",
        "β × nats",
        "Reward of the chosen answer minus that of the rejected one; the reward is β log(policy / reference).",
        0.0,
    ),
    Curve(
        "rewards/accuracies",
        "Reward accuracy",
        "share of pairs",
        "How often the chosen answer of a training pair has the higher reward; at the very start both rewards are 0.",
        0.5,
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
)

# Colours that colour-blind readers can distinguish, on white and on black. Curves often coincide, as they should:
# the first is a broad pale band, and later ones are thin and dashed, so that all are visible.
_COLOURS = ("#4d8df6", "#e8710a", "#0b9e74", "#c0529e", "#8a8f98", "#b58900")
_DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1.2, 1.4)), (0, (6, 2, 1.5, 2)), "solid", (0, (2, 2)))
_WIDTHS = (5.5, 1.9, 2.4, 1.9, 1.5, 1.5)
_OPACITIES = (0.5, 1, 1, 1, 1, 1)
_INK = "#123456"  # stands for the page's own colour and is replaced by it
_SVG_TEXT: Any = {"svg.fonttype": "none", "font.size": 11, "font.family": "sans-serif"}


def write_report(
    path: str | Path,
    *,
    title: str,
    lead: Sequence[str],
    runs: Mapping[str, LogHistory],
    table: Table,
    changes: Changes | None = None,
    further: Sequence[Table] = (),
    curves: Sequence[Curve] = DPO_CURVES,
) -> Path:
    """Writes the page.

    Args:
        path: The file to write.
        title: Title of the page.
        lead: Paragraphs at the top.
        runs: Name -> log; one colour each, in this order. A curve that no run logged is omitted.
        table: The main table.
        changes: Numbers before and after, as one more figure.
        further: Tables at the end.
        curves: The curves to draw.

    Returns:
        The path.
    """
    drawn = [curve for curve in curves if any(_points(log, curve.key)[0] for log in runs.values())]
    figures = [_figure(c.title, c.about, _draw_curve(runs, c)) for c in drawn]
    if changes is not None:
        figures.insert(0, _figure(changes.title, changes.about, _draw_changes(changes, list(runs))))
    page = _PAGE.substitute(
        title=html.escape(title),
        lead="\n".join(f"<p>{html.escape(paragraph)}</p>" for paragraph in lead),
        table=_table(table),
        legend=_legend(list(runs)),
        figures="\n".join(figures),
        further="\n".join(_table(other) for other in further),
        data=_data(runs, drawn),
    )
    Path(path).write_text(page, encoding="utf-8")
    return Path(path)


def _points(log: LogHistory, key: str) -> tuple[list[float], list[float]]:
    """(steps, values) of the log's entries that have the metric."""
    entries = [(float(entry["step"]), float(entry[key])) for entry in log if key in entry and "step" in entry]
    return [step for step, _ in entries], [value for _, value in entries]


def _styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    looks = zip(_COLOURS, _DASHES, _WIDTHS, _OPACITIES, strict=True)
    return {
        name: {"color": colour, "linestyle": dash, "linewidth": width, "alpha": opacity}
        for name, (colour, dash, width, opacity) in zip(names, cycle(looks), strict=False)
    }


def _draw_curve(runs: Mapping[str, LogHistory], curve: Curve) -> str:
    with matplotlib.rc_context(_SVG_TEXT):
        figure, axes = _empty_axes(width=5.4, height=3.3)
        if curve.baseline is not None:
            axes.axhline(curve.baseline, color=_INK, alpha=0.5, linewidth=0.8, linestyle=(0, (2, 3)))
        for name, style in _styles(runs).items():
            axes.plot(*_points(runs[name], curve.key), label=name, **style)
        axes.set_xlabel("optimizer step", color=_INK)
        axes.set_ylabel(f"{curve.title.lower()} ({curve.unit})", color=_INK)
        axes.set_xlim(left=0)
        return _svg(figure, curve.title, curve.about)


def _draw_changes(changes: Changes, names: list[str]) -> str:
    styles = _styles(names)
    with matplotlib.rc_context(_SVG_TEXT):
        figure, axes = _empty_axes(width=5.4, height=3.3)
        for row, (name, (before, after)) in enumerate(changes.values.items()):
            colour = styles[name]["color"]
            axes.plot([before, after], [row, row], color=colour, linewidth=3, solid_capstyle="round", alpha=0.55)
            axes.plot(before, row, "o", markersize=8, markerfacecolor="none", markeredgecolor=colour, markeredgewidth=2)
            axes.plot(after, row, "o", markersize=10, color=colour)
            axes.annotate(
                f"{before:.0%} → {after:.0%}", ((before + after) / 2, row), (0, 8), textcoords="offset points",
                ha="center", color=_INK,
            )  # fmt: skip
        axes.set_yticks(range(len(changes.values)), list(changes.values))
        axes.set_ylim(len(changes.values) - 0.5, -0.7)
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set_xlabel(changes.unit, color=_INK)
        return _svg(figure, changes.title, changes.about)


def _empty_axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color=_INK, alpha=0.5)
    axes.tick_params(color=_INK, labelcolor=_INK)
    axes.grid(color=_INK, alpha=0.12, linewidth=0.8)
    return figure, axes


def _svg(figure: Figure, title: str, about: str) -> str:
    """The figure as an `<svg>` element that scales, has a description, and takes the page's colour and font."""
    buffer = io.StringIO()
    # Names inside a figure are derived from this salt: figures of one page must not share them.
    with matplotlib.rc_context({"svg.hashsalt": title}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    # A style element would apply to the whole page.
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r"font: ([\d.]+)px[^;\"]*", r"font-size: \1px", text)
    prefix = re.sub(r"\W+", "-", title.lower())
    text = re.sub(r'id="(?=(figure|axes|patch|line2d|text|matplotlib|xtick|ytick)[._])', f'id="{prefix}-', text)
    name = html.escape(f"{title}. {about}", quote=True)
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{name}">', text)
    return text


def _figure(title: str, about: str, svg: str) -> str:
    return (
        f"<figure><figcaption><strong>{html.escape(title)}</strong> {html.escape(about)}</figcaption>\n{svg}</figure>"
    )


def _legend(names: list[str]) -> str:
    return "".join(f"<li>{_line(style)} {html.escape(name)}</li>" for name, style in _styles(names).items())


def _line(style: Mapping[str, Any]) -> str:
    """A short piece of a run's curve."""
    width, dashes = style["linewidth"], () if style["linestyle"] == "solid" else style["linestyle"][1]
    pattern = " ".join(f"{width * length:.1f}" for length in dashes)  # matplotlib counts in line widths
    return (
        '<svg viewBox="0 0 34 8" width="34" height="8" aria-hidden="true"><line x1="1" x2="33" y1="4" y2="4" '
        f'stroke="{style["color"]}" stroke-width="{width}" stroke-opacity="{style["alpha"]}" '
        f'stroke-dasharray="{pattern}"/></svg>'
    )


def _table(table: Table) -> str:
    kinds = [' class="number"' if _is_numeric(column) else "" for column in zip(*table.rows, strict=True)]
    heads = "".join(_head(text, kind) for text, kind in zip(table.columns, kinds, strict=True))
    rows = "\n".join(_row(cells, kinds) for cells in table.rows)
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in table.notes)
    title = f"<h2>{html.escape(table.title)}</h2>"
    body = (
        f'<div class="scroll"><table><thead><tr>{heads}</tr></thead>\n<tbody>{rows}</tbody></table></div>\n'
        f'<div class="notes">{notes}</div>'
    )
    return f"<details><summary>{title}</summary>\n{body}</details>" if table.folded else f"{title}\n{body}"


def _head(text: str, kind: str) -> str:
    name, _, unit = text.partition("\n")
    small = f"<small>{html.escape(unit)}</small>" if unit else ""
    return f'<th scope="col"{kind}>{html.escape(name)}{small}</th>'


def _row(cells: Sequence[str], kinds: Sequence[str]) -> str:
    rest = "".join(f"<td{kind}>{html.escape(text)}</td>" for text, kind in zip(cells[1:], kinds[1:], strict=True))
    return f'<tr><th scope="row">{html.escape(cells[0])}</th>{rest}</tr>'


def _is_numeric(cells: Iterable[str]) -> bool:
    return all(re.match(r"[−+-]?\d", cell) for cell in cells)


def _data(runs: Mapping[str, LogHistory], curves: Sequence[Curve]) -> str:
    """The data of the figures, so that readers can plot it again."""
    numbers = {
        name: {curve.key: dict(zip(("step", "value"), _points(log, curve.key), strict=True)) for curve in curves}
        for name, log in runs.items()
    }
    return json.dumps(numbers).replace("</", "<\\/")


_PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1f2430; --soft: #5b6372; --line: #d9dde4; --back: #ffffff; --card: #f7f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7ec; --soft: #9aa3b2; --line: #343a46; --back: #14171c; --card: #1b1f26; }
}
body { margin: 0 auto; max-width: 68rem; padding: 2.5rem 1.25rem 4rem; background: var(--back); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
p { max-width: 48rem; margin: .5rem 0; }
.notes p { color: var(--soft); font-size: .875rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .925rem; }
th, td { padding: .5rem .7rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: baseline; }
thead th { vertical-align: bottom; border-bottom: 2px solid var(--line); font-weight: 600; line-height: 1.3; }
th small { display: block; color: var(--soft); font-weight: 400; }
tbody th { font-weight: 600; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.5rem; list-style: none; margin: 0 0 1rem; padding: 0; }
.legend svg { vertical-align: middle; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(27rem, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; padding: 1rem 1rem .5rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; display: flex; flex-direction: column; justify-content: space-between; }
figure svg { width: 100%; height: auto; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
summary { cursor: pointer; margin-top: 2.5rem; }
summary h2 { display: inline; }
details .scroll { margin-top: .75rem; }
figcaption { font-size: .875rem; color: var(--soft); margin-bottom: .5rem; }
figcaption strong { display: block; font-size: 1rem; color: var(--ink); }
</style>
</head>
<body>
<main>
<h1>$title</h1>
$lead
$table
<h2>In pictures</h2>
<ul class="legend">$legend</ul>
<div class="figures">
$figures
</div>
$further
</main>
<script type="application/json" id="curves">$data</script>
</body>
</html>
""")
