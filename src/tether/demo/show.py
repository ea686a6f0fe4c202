"""What the demo prints, within 80 columns, and its page. Knows results; computes none."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable

from tether.report import Table, write_report

WIDTH, SHOWN_ANSWERS = 80, 3
COMPARED_AT = (1, 3, 6)  # steps; the synchronized reference moves after the second

# The figures by which the runs are told apart: name, metric, format. The first three look best where the model is ruined.
FIGURES = (
    ("loss, held out", "eval_loss", ".3f"),
    ("rewards/accuracies", "eval_rewards/accuracies", ".2f"),
    ("rewards/margins", "eval_rewards/margins", "+.2f"),
    ("rewards/chosen", "eval_rewards/chosen", "+.2f"),
    ("token accuracy", "eval_mean_token_accuracy", ".2f"),
    ("answers: tokens", "samples/length", ".0f"),
    ("answers: ended", "samples/ended", ".2f"),
    ("answers: surprise, nats/token", "samples/surprise", ".2f"),
    ("answers: KL, nats/token", "samples/kl", ".2f"),
)


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        name: Its name.
        kind: Of its reference.
        log: The trainer's log.
        samples: Answers to the held-out questions: rows of `samples.jsonl`.
        extra_bytes: Weights that the reference holds beside the policy.
        passes: Forward passes of the reference in the steps that are compared.
        num_found: Responses that were found in the store.
        num_scored: Responses that were scored before training and put in the store.
        step_seconds: Median duration of a training step.
    """

    name: str
    kind: str
    log: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    extra_bytes: int
    passes: int
    num_found: int
    num_scored: int
    step_seconds: float

    @property
    def losses(self) -> list[float]:
        """Of each step."""
        return [entry["loss"] for entry in self.log if "loss" in entry]

    def figure(self, metric: str, *, at_end: bool) -> float | None:
        """The last value of a metric, or the first; None if it was not logged."""
        values = [float(entry[metric]) for entry in self.log if metric in entry]
        return (values[-1] if at_end else values[0]) if values else None

    def answers(self, *, at_end: bool) -> list[str]:
        """To the held-out questions, after training or before it."""
        step = max(row["step"] for row in self.samples) if at_end else 0
        return [str(row["policy"]) for row in self.samples if row["step"] == step]


@dataclass(frozen=True)
class Result:
    """What `run_demo` measured.

    Attributes:
        folder: Where everything is.
        about: The model, in words.
        policy: Its path or name.
        num_pairs: Pairs trained on.
        questions: What was asked.
        good: The good run; its reference is implicit.
        too_far: The run that ruined the model.
        others: The first steps of the good run with each of the other references.
        again: One more step with the precomputed reference, which finds its answers in the store.
        seconds: Duration of the whole demo.
    """

    folder: Path
    about: str
    policy: str
    num_pairs: int
    questions: list[str]
    good: Run
    too_far: Run
    others: list[Run]
    again: Run
    seconds: float

    @property
    def report(self) -> Path:
        return self.folder / "report.html"


class Narrator:
    """Says what happens and how long it took, with a moving bar in a terminal."""

    def __init__(self) -> None:
        self._console = Console(width=WIDTH, highlight=False)

    def print(self, text: str = "") -> None:
        self._console.print(escape(text))

    @contextmanager
    def step(self, title: str, total: int) -> Iterator[Callable[[], None]]:
        """One part of the demo; yields a function to call after each of `total` steps."""
        start, console = time.perf_counter(), self._console
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=16), MofNCompleteColumn())
        shown = Progress(*columns, TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal)
        if not console.is_terminal:
            self.print(f"         {title} ...")
        with shown:
            task = shown.add_task(escape(title), total=total)
            yield lambda: shown.advance(task)
        self.print(f"{time.perf_counter() - start:6.1f} s {title}")

    def show(self, table: RichTable) -> None:
        self._console.print(table)


def print_result(narrator: Narrator, result: Result) -> None:
    """Prints answers, figures, references, and how to go on."""
    say = narrator.print
    say()
    say("Held-out questions, answered before, after the good run, and after the one that went too far:")
    narrator.show(_answers_in_terminal(result))
    say("Loss, accuracy and margin call the ruined model the better one. The rest tells them apart:")
    narrator.show(_plain_table(("", "before", "good", "too far"), figure_rows(result)))
    say("The same pairs with each reference (all train the same LoRA adapter):")
    narrator.show(_plain_table(_REFERENCE_COLUMNS, reference_rows(result)))
    say(store_note(result))
    say()
    say(f"{result.seconds:.0f} s in all. The page with curves and all answers: {result.report}")
    say("Go on with")
    for command in next_commands(result):
        say(command)


def write_page(result: Result) -> None:
    """Writes `result.report`."""
    write_report(
        result.report,
        title="A model that learned, and one that was ruined",
        lead=[
            f"{result.about} learned from {result.num_pairs} pairs of its own answers to answer in one sentence: the "
            "chosen response is the first sentence of the rejected one. The good run adds a term that keeps the chosen "
            "response likely (`sft`). The other one went too far: its loss, accuracy and margin are better, and what "
            "it says is worse.",
        ],
        tables=[
            Table("Answers to held-out questions", ["question", "before", "good", "too far"],
                  answer_rows(result),
                  ["Each token is the most likely one, up to 64. These are the first held-out questions; none was selected."]),
            Table("What tells them apart", ["figure", "before", "good", "too far"], figure_rows(result),
                  ["On held-out pairs and questions. Surprise: the initial model's nats per token on the answers above. KL: "
                   "of the policy from the initial model, on drawn answers."]),
            Table("The four references", [title.replace("\n", " ") for title in _REFERENCE_COLUMNS], reference_rows(result),
                  [store_note(result)]),
        ],
        runs={"good": result.good.log, "too far": result.too_far.log},
    )


def answer_rows(result: Result) -> list[list[str]]:
    """Question, and its answers before, after the good run, and after the one that went too far."""
    before, good = result.good.answers(at_end=False), result.good.answers(at_end=True)
    return [list(row) for row in zip(result.questions, before, good, result.too_far.answers(at_end=True), strict=True)]


def figure_rows(result: Result) -> list[list[str]]:
    """Name, before, good, too far."""
    rows = []
    for name, metric, form in FIGURES:
        values = [result.good.figure(metric, at_end=False), result.good.figure(metric, at_end=True)]
        values.append(result.too_far.figure(metric, at_end=True))
        rows.append([name, *("-" if value is None else format(value, form) for value in values)])
    return rows


_REFERENCE_COLUMNS = ("reference", "loss at\nstep 1", "\nstep 3", "\nstep 6", "weights\nbeside", "passes", "seconds\na step")


def reference_rows(result: Result) -> list[list[str]]:
    """The good run and the others: losses at three steps, and what the reference cost."""
    return [
        [
            run.kind,
            *(format(run.losses[step - 1], ".5f") for step in COMPARED_AT),
            f"{run.extra_bytes / 1e6:,.1f} MB",
            f"{run.passes:,}",
            f"{run.step_seconds:.2f}",
        ]
        for run in (result.others[0], result.good, *result.others[1:])
    ]


def store_note(result: Result) -> str:
    first = next(run for run in result.others if run.kind == result.again.kind)
    return (
        f"Passes: of the reference, in {COMPARED_AT[-1]} steps. The precomputed one scored {first.num_scored} responses before "
        f"training, on disk; the next run on these pairs found {result.again.num_found}, and scored {result.again.num_scored}. "
        "The synchronized one (TR-DPO) moved after step 3."
    )


def next_commands(result: Result) -> list[str]:
    """How to go on: ask the models, and train on one's own pairs."""
    run = result.folder
    return [
        f'  tether ask {run / "good"} "{result.questions[0]}"',
        f"  tether train --model {result.policy} --train_data YOUR_PAIRS.jsonl \\",
        f"      --lora_r 16 --learning_rate 1e-4 --eval_fraction 0.1 --report_samples 8 \\",
        f"      --output_dir {run / 'own'}",
    ]


def _answers_in_terminal(result: Result) -> RichTable:
    table = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, show_lines=True, width=WIDTH)
    for title in ("before", "good", "too far"):
        table.add_column(title, ratio=1, vertical="top")
    for question, *answers in list(answer_rows(result))[:SHOWN_ANSWERS]:
        table.add_row(f"[bold]{escape(question)}[/]")
        table.add_row(*(escape(answer) for answer in answers))
    return table


def _plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> RichTable:
    table = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", vertical="bottom")
    for row in rows:
        table.add_row(*row)
    return table
