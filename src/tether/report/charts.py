"""Draws lines over steps as inline SVG that takes the page's colour and font. The only file that draws."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tether.errors import MissingPackageError

try:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
except ImportError as error:
    raise MissingPackageError(
        problem="Cannot draw a report: matplotlib, which draws its curves, is not installed.",
        details="Only reports and `tether demo` draw, so a plain install does not include matplotlib.",
        instead="Install it: `pip install matplotlib`, or `pip install '.[demo]'` in a clone of Tether.",
    ) from error

# Colour, dashes, width, opacity and marker of each line. The colours differ for colour-blind readers, on white and on
# black; without colour, dashes and markers do. Curves often coincide, as they should: the first is a broad pale band,
# later ones are thin and dashed, and markers are hollow, so that all are visible.
_LOOKS: tuple[tuple[str, tuple[float, ...], float, float, str], ...] = (
    ("#4d8df6", (), 5.5, 0.5, "o"),
    ("#e8710a", (5, 2), 1.9, 1, "s"),
    ("#0b9e74", (1.2, 1.4), 2.4, 1, "^"),
    ("#c0529e", (6, 2, 1.5, 2), 1.9, 1, "D"),
    ("#8a8f98", (), 1.5, 1, "v"),
    ("#b58900", (2, 2), 1.5, 1, "x"),
    ("#d64545", (10, 3), 1.5, 1, "P"),
    ("#7f6bd8", (4, 1.5, 1, 1.5, 1, 1.5), 1.9, 1, "*"),
)
_INK = "#123456"  # stands for the page's own colour and is replaced by it
_FEW = 2  # points that make no visible line


@matplotlib.rc_context({"font.size": 11})
def draw_lines(lines: Sequence[Mapping[str, Sequence[float]]], unit: str, baseline: float | None, name: str) -> str:
    """One line per run, in the look of its place.

    Args:
        lines: For each run, its "step"s and the "value" at each.
        unit: Label of the vertical axis.
        baseline: A value to mark by a thin line.
        name: Of this drawing alone in the page.
    """
    figure = Figure(figsize=(4.6, 2.8), layout="constrained")
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color=_INK, alpha=0.5)
    axes.tick_params(color=_INK, labelcolor=_INK)
    axes.grid(color=_INK, alpha=0.12, linewidth=0.8)
    if baseline is not None:
        axes.axhline(baseline, color=_INK, alpha=0.5, linewidth=0.8, dashes=(2, 3))
    for place, line in enumerate(lines):
        axes.plot(line["step"], line["value"], **_look(place, marked=len(line["step"]) <= _FEW))
    axes.set_xlabel("optimizer step", color=_INK)
    axes.set_ylabel(unit, color=_INK)
    axes.set_xlim(left=0)
    return _svg(figure, name)


def draw_sample(place: int) -> str:
    """A short piece of the line of a place, for the legend."""
    figure = Figure(figsize=(0.6, 0.2))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.plot([0, 1, 2], [0, 0, 0], markevery=[1], **_look(place, marked=True))
    return _svg(figure, f"legend {place}")


def _look(place: int, *, marked: bool) -> dict[str, Any]:
    colour, dashes, width, opacity, marker = _LOOKS[place % len(_LOOKS)]
    marking = {"marker": marker, "markersize": width + 5, "markerfacecolor": "none", "markeredgewidth": 1.8}
    return {"color": colour, "dashes": dashes, "linewidth": width, "alpha": opacity} | (marking if marked else {})


def _svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element that scales and has no names but those it uses, derived from `name`."""
    figure.patch.set_visible(False)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    # A style element would apply to the whole page.
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r"font: ([\d.]+)px[^;\"]*", r"font-size: \1px", text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    return re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r"<svg \1>", text)
