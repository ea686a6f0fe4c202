"""Shows what the demo does: progress and a table in the terminal, a page for the browser.

Knows results; computes none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table as RichTable

from tether.demo.result import DemoResult, Outcome
from tether.demo.settings import DemoSettings
from tether.demo.task import is_right
from tether.report import Table, write_report

# The terminal's table fits 80 columns; the page has one more column, and units on their own line.
_COLUMNS = (
    "reference",
    "extra\nweight\nbytes",
    "reference\npasses",
    "seconds",
    "reward\naccuracy",
    "task accuracy\nbefore → after",
    "sequence\nKL (nats)",
)
_PAGE_COLUMNS = (
    "reference",
    "extra weights\nbytes",
    "reference passes\nbatches",
    "time\nseconds",
    "reward accuracy\nheld-out pairs",
    "task accuracy\nbefore → after",
    "greedy accuracy\nbefore → after",
    "sequence KL\nnats",
)


class Narrator:
    """Prints each step and its duration, with a moving bar in a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def step(self, title: str, total: int, detail: str = "") -> Iterator[Callable[..., None]]:
        """One step of `total` parts; yields a function to call with the number of parts done (default 1)."""
        start = time.perf_counter()
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn())
        with Progress(
            *columns, console=self._console, transient=True, disable=not self._console.is_terminal
        ) as progress:
            task = progress.add_task(escape(title), total=total)
            yield lambda parts=1: progress.advance(task, parts)
        self.print(f"[dim]{time.perf_counter() - start:6.1f} s[/]  {escape(f'{title}: {detail}' if detail else title)}")

    def print(self, text: str) -> None:
        """Prints a line of rich markup."""
        self._console.print(text, highlight=False, soft_wrap=True)


def print_result(console: Console, result: DemoResult) -> None:
    """Prints the table, its notes, and the path of the report."""
    table = RichTable(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    for place, column in enumerate(_COLUMNS):
        table.add_column(column, justify="right" if place else "left", vertical="bottom", no_wrap=True)
    for row in _rows(result):
        table.add_row(*row)
    console.print()
    console.print(table)
    console.print()
    for note in _notes(result):
        console.print(note, highlight=False, soft_wrap=True)
    console.print(f"{result.seconds:.0f} s in total. Report: {result.report}", highlight=False, soft_wrap=True)


def write_demo_report(result: DemoResult, settings: DemoSettings, *, seed: int) -> None:
    """Writes `result.report`."""
    notes = [
        *_notes(result),
        "Rewards count from the reference, so where the synchronized one has moved towards the policy (every "
        f"{settings.sync_steps} steps), margins fall back and the loss jumps up.",
    ]
    write_report(
        result.report,
        title="One task, one set of pairs, four references",
        lead=_lead(result, settings),
        runs={outcome.strategy.name: outcome.log_history for outcome in result.outcomes},
        tables=[Table("Cost and result of each reference", _PAGE_COLUMNS, _page_rows(result), notes)],
        further=[_examples(result), _settings_table(settings, seed)],
    )


def _rows(result: DemoResult) -> list[list[str]]:
    return [_row(result, outcome) for outcome in result.outcomes]


def _page_rows(result: DemoResult) -> list[list[str]]:
    return [
        [*row[:-1], f"{result.before.greedy_accuracy:.1%} → {outcome.after.greedy_accuracy:.1%}", row[-1]]
        for row, outcome in zip(_rows(result), result.outcomes, strict=True)
    ]


def _row(result: DemoResult, outcome: Outcome) -> list[str]:
    before, after = result.before, outcome.after
    return [
        outcome.strategy.name,
        f"{outcome.extra_bytes:,}",
        f"{outcome.num_passes:,}",
        f"{outcome.seconds:.1f}",
        f"{outcome.reward_accuracy:.1%}",
        f"{before.sampled_accuracy:.1%} → {after.sampled_accuracy:.1%}",
        f"{round(outcome.kl.mean, 2) + 0.0:.2f} ± {outcome.kl.standard_error:.2f}",
    ]


def _notes(result: DemoResult) -> list[str]:
    num_samples = sum(len(given) for given in result.before.samples)
    best = max(outcome.after.greedy_accuracy for outcome in result.outcomes)
    return [
        f"Task accuracy: the share of right ones among {num_samples:,} answers to {len(result.held_out_prompts):,} "
        "held-out prompts, sampled at temperature 1. (Greedy answers, the likeliest letter at each place: "
        f"{result.before.greedy_accuracy:.1%} before, {best:.1%} after at best.) Reward accuracy: of held-out pairs. "
        "KL: KL(trained ‖ initial) of whole answers, over the trained policy's samples, ± one standard error.",
        "Explicit, precomputed and synchronized train all weights, implicit a LoRA adapter. Passes: forward passes of "
        "the reference, in training and evaluation. The precomputed ones came before training and stay on disk: a "
        f"second trainer on the same pairs made {result.num_passes_again}.",
    ]


def _lead(result: DemoResult, settings: DemoSettings) -> list[str]:
    best = max(result.outcomes, key=lambda outcome: outcome.after.sampled_accuracy)
    return [
        f"A language model of {result.num_parameters:,} parameters learned from scratch to put the letters of "
        f"made-up words in order, from texts of which only {settings.right_share:.0%} are right. It imitates them all: "
        f"{result.before.sampled_accuracy:.1%} of its sampled answers to held-out prompts are right.",
        f"Its own answers to other prompts, right ones paired with wrong ones by a rule, made {result.num_pairs:,} "
        "preference pairs. DPO on these pairs, once with each reference, lifts that share to as much as "
        f"{best.after.sampled_accuracy:.1%} ({best.strategy.name}).",
    ]


def _examples(result: DemoResult, count: int = 10) -> Table:
    measured = [result.before, *(outcome.after for outcome in result.outcomes)]
    rows = [
        [prompt.strip(), *(_marked(prompt, measurement.samples[place][0]) for measurement in measured)]
        for place, prompt in enumerate(result.held_out_prompts[:count])
    ]
    return Table(
        "A few answers to held-out prompts",
        ["prompt", "before", *(outcome.strategy.name for outcome in result.outcomes)],
        rows,
        ["The first sample of each of the first prompts, drawn with the same random numbers; nothing is selected."],
    )


def _marked(prompt: str, answer: str) -> str:
    return f"{'✓' if is_right(prompt, answer) else '✗'} {answer}"


def _settings_table(settings: DemoSettings, seed: int) -> Table:
    rows = [[name.replace("_", " "), str(value)] for name, value in vars(settings).items()]
    return Table("Settings", ["setting", "value"], [*rows, ["seed", str(seed)]], folded=True)
