"""What the demo prints, within 80 columns, and its page. Knows results; computes none."""

from __future__ import annotations

import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable
from transformers.utils import logging as transformers_logging

from tether.report import Table, write_report

STEPS = (1, 3, 6)  # whose losses are compared between references
MOVES_AFTER = 3  # the step after which the synchronized reference moves
SHOWN_ANSWERS = 3  # in the terminal

# What tells the runs apart: name, metric, format. The first three look best where the model is ruined.
FIGURES = (
    ("accuracy", "eval_rewards/accuracies", ".2f"),
    ("margin", "eval_rewards/margins", "+.2f"),
    ("rewards/chosen", "eval_rewards/chosen", "+.2f"),
    ("token accuracy", "eval_mean_token_accuracy", ".2f"),
    ("tokens of an answer", "samples/length", ".0f"),
    ("answers that end", "samples/ended", ".0%"),
    ("surprise, nats a token", "samples/surprise", ".2f"),
    ("KL, nats a token", "samples/kl", ".2f"),
)
_ANSWERS = ("before", "good", "too far")
_REFERENCES = (
    "reference",
    *(f"loss,\nstep {step}" for step in STEPS),
    "weights\nbeside",
    "its\npasses",
    "seconds\na step",
)


@dataclass(frozen=True)
class Run:
    """A run: its reference's kind, its log, the rows of `samples.jsonl`, and what the reference cost.

    `passes` are those in the steps that are compared; `found` and `scored` count the responses of a store.
    """

    kind: str
    log: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    extra_bytes: int
    passes: int
    found: int
    scored: int
    step_seconds: float

    @property
    def losses(self) -> list[float]:
        """Of each step."""
        return [entry["loss"] for entry in self.log if "loss" in entry]

    def figure(self, metric: str, place: int = -1) -> float:
        """A metric at the first evaluation (0) or the last (-1)."""
        return float([entry[metric] for entry in self.log if metric in entry][place])

    def figures(self, place: int) -> list[str]:
        """All of `FIGURES`."""
        return [format(round(self.figure(metric, place), 4) + 0.0, form) for _, metric, form in FIGURES]

    def answers(self, place: int) -> list[str]:
        """To the held-out questions, at the first report (0) or the last (-1)."""
        step = self.samples[place]["step"]
        return [row["policy"].strip() or "(nothing)" for row in self.samples if row["step"] == step]


@dataclass(frozen=True)
class Result:
    """What `run_demo` measured: two runs with an implicit reference, and the first one's start with the others.

    `about` is the model in words, `policy` its path or name; `again` ran after the precomputed one, on its store.
    """

    folder: Path
    about: str
    policy: str
    questions: list[str]
    good: Run
    too_far: Run
    others: list[Run]
    again: Run
    seconds: float

    @property
    def report(self) -> Path:
        """The page."""
        return self.folder / "report.html"

    @property
    def answers(self) -> list[list[str]]:
        """Question, and its answer before, after the good run, and after the one that went too far."""
        columns = self.questions, self.good.answers(0), self.good.answers(-1), self.too_far.answers(-1)
        return [list(row) for row in zip(*columns, strict=True)]

    @property
    def figures(self) -> list[list[str]]:
        """A row for each of `FIGURES`; before training the pairs say nothing yet."""
        names = [name for name, _, _ in FIGURES]
        return [
            list(row)
            for row in zip(names, self.good.figures(0), self.good.figures(-1), self.too_far.figures(-1), strict=True)
        ]

    @property
    def verdict(self) -> str:
        """What accuracy and margin say of the run that went too far."""
        good, too_far = ([run.figure(metric) for _, metric, _ in FIGURES[:2]] for run in (self.good, self.too_far))
        if not all(theirs >= ours for ours, theirs in zip(good, too_far, strict=True)):
            return "On held-out pairs and questions"
        others_tell = self.good.figures(-1)[3:] != self.too_far.figures(-1)[3:]
        then = ". The other figures tell" if others_tell else ""
        return f"By accuracy and margin, the run that went too far is as good or better{then}"

    @property
    def references(self) -> list[list[str]]:
        """A row for each kind: losses at `STEPS`, and what it cost."""
        return [
            [
                run.kind,
                *(format(run.losses[step - 1], ".4f") for step in STEPS),
                f"{run.extra_bytes / 1e6:,.1f} MB",
                f"{run.passes}",
                f"{run.step_seconds:.2f}",
            ]
            for run in (self.others[0], self.good, *self.others[1:])
        ]

    @property
    def notes(self) -> list[str]:
        """On the references."""
        first = next(run for run in self.others if run.kind == self.again.kind)
        return [
            f"The precomputed reference scored {first.scored} responses before training. The next run on these pairs "
            f"scored {self.again.scored}: it found {self.again.found} in the store.",
            f"The synchronized reference (TR-DPO) moves after step {MOVES_AFTER}, so its losses differ from then on.",
        ]


class Narrator:
    """Says what happens and how long it takes, with a moving bar in a terminal."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)
        self.console.width = min(self.console.width, 80)

    def say(self, text: str = "") -> None:
        self.console.print(escape(text))

    @contextmanager
    def part(self, title: str, total: int, then: str = "") -> Iterator[Callable[[], None]]:
        """A part of the demo; yields a function to call after each of `total` steps; `then` comes after them."""
        start = time.perf_counter()
        self.say(title)
        text = TextColumn("{task.description}")
        columns = (SpinnerColumn(), BarColumn(bar_width=40), MofNCompleteColumn(), TimeElapsedColumn(), text)
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bar:
            task = bar.add_task("", total=total)

            def advance() -> None:
                bar.advance(task)
                if bar.finished:
                    bar.update(task, description=then)

            yield advance
        self.say(f"  {time.perf_counter() - start:.1f} s")


def print_result(narrator: Narrator, result: Result) -> None:
    """Prints answers, figures, references, and how to go on."""
    say, show = narrator.say, narrator.console.print
    say("\nAnswers to held-out questions")
    for question, *answers in result.answers[:SHOWN_ANSWERS]:
        side_by_side = RichTable(*_ANSWERS, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, expand=True)
        for column in side_by_side.columns:
            column.ratio = 1
        side_by_side.add_row(*(escape(answer) for answer in answers))
        narrator.console.print(f"\n[bold]{escape(question)}")
        show(side_by_side)
    say(f"\n{result.verdict}:")
    show(_aligned(("", *_ANSWERS), result.figures))
    say("\nThe good run's first steps, with each reference:")
    show(_aligned(_REFERENCES, result.references))
    for note in result.notes:
        say(note)
    say(f"\n{result.seconds:.0f} s in all. All answers and the curves: {result.report}\n\nGo on with:")
    beside = Path(sys.argv[0])  # where it was called by its path, as by `make demo`
    command = beside if beside.name == "tether" and shutil.which("tether") is None else "tether"
    commands = (
        f'{command} ask {result.folder / "good"} "{result.questions[0]}"',
        f"{command} train --model {result.policy} --train_data YOUR_PAIRS.jsonl \\",
        "  --lora_r 16 --learning_rate 1e-4 --eval_fraction 0.1 --report_samples 8 \\",
        f"  --output_dir {result.folder / 'own'}",
    )
    print("\n".join(f"  {command}" for command in commands))  # unwrapped, to be copied


def write_page(result: Result) -> None:
    """Writes `result.report`."""
    write_report(
        result.report,
        title="One lesson, well learned and taken too far",
        lead=[
            f"{result.about}, was trained to answer in one sentence: of each pair, the chosen response is the first "
            "sentence of the rejected one. The good run adds a term that keeps the chosen responses likely, the other "
            "one goes without."
        ],
        tables=[
            Table("Answers to held-out questions", ("question", *_ANSWERS), result.answers, [_ABOUT_ANSWERS]),
            Table(
                "What tells them apart",
                ("on held-out pairs and questions", *_ANSWERS),
                result.figures,
                [f"{result.verdict}.", _ABOUT_FIGURES],
            ),
            Table("The good run's first steps with each reference", _REFERENCES, result.references, result.notes),
        ],
        runs={"good": result.good.log, "too far": result.too_far.log},
    )


_ABOUT_ANSWERS = "Each token is the likeliest, 48 at most. The first held-out questions; none was selected."
_ABOUT_FIGURES = (
    "Surprise: the initial model's nats per token on the answers above. KL: of the policy from the initial model, on "
    "answers that were drawn."
)


def _aligned(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> RichTable:
    table = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", vertical="bottom")
    for row in rows:
        table.add_row(*row)
    return table


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hides progress bars of libraries between ours, and warnings that users cannot act on."""
    bars = [
        (library.is_progress_bar_enabled(), library.disable_progress_bar, library.enable_progress_bar)
        for library in (transformers_logging, datasets.utils.logging)
    ]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT (0.21) asks transformers by an old name
            for _, hide, _ in bars:
                hide()
            yield
    finally:
        for was_shown, _, show in bars:
            if was_shown:
                show()
