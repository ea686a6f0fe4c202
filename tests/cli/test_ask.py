"""`tether ask`: what policy and reference answer, against answers of plain forwards."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from support.runs import make_trainer, trained
from support.tiny import tiny_model, tiny_tokenizer
from tether.cli import main
from tether.cli.ask import Column

QUESTION, LENGTH = "What is rain?", 8
ASKED = [{"role": "user", "content": QUESTION}]


def expected(model: Any, chat: bool = True) -> str:
    """The greedy answer of plain forwards."""
    tokenizer = tiny_tokenizer(chat=chat)
    ids: Any = tokenizer(QUESTION)["input_ids"]
    if chat:
        ids = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=True)["input_ids"]
    answer: list[int] = []
    with torch.no_grad():
        while len(answer) < LENGTH and 0 not in answer:
            answer.append(int(model(input_ids=torch.tensor([ids + answer])).logits[0, -1].argmax()))
    return str(tokenizer.decode(answer, skip_special_tokens=True)).strip()


def ask(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[list[str], str]:
    """The lines of standard output, and standard error."""
    capsys.readouterr()
    assert main(["ask", *words, "--max_new_tokens", str(LENGTH)]) == 0
    said = capsys.readouterr()
    return [" ".join(line.split()) for line in said.out.splitlines()], said.err


def lines(policy: Any, reference: Any = None, chat: bool = True) -> list[str]:
    voices = {"policy": policy, "reference": reference}
    answers = {label: expected(model, chat) for label, model in voices.items() if model is not None}
    return [" ".join(f"{label} {answer}".split()) for label, answer in answers.items()]


@pytest.fixture
def initial(tmp_path: Path) -> Path:
    folder = tmp_path / "initial"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def run(folder: Path, model: Any, **options: Any) -> Path:
    """The output folder of a run that has changed what the policy answers."""
    trainer = trained(folder, model, learning_rate=3e-2, max_steps=4, **options)
    trainer.save_model()
    return folder


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_a_question_that_is_not_unicode_is_refused(initial: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", str(initial), "\udcff"]) == 2
    assert "Cannot ask '\\udcff': it is not text in UTF-8." in capsys.readouterr().err


# ---- which models ----------------------------------------------------------------------------------------------------


def test_a_full_model_is_asked_beside_the_model_its_run_started_from(
    initial: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(tmp_path / "run", str(initial))
    policy, reference = load(folder), tiny_model()
    assert expected(policy) != expected(reference)
    assert ask(capsys, str(folder), QUESTION) == (lines(policy, reference), "")
    note = json.loads((folder / "reference.json").read_text())
    assert note["model"] == str(initial) and note["kind"] == "explicit"


def test_the_reference_model_is_named_if_there_was_one(
    initial: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    tiny_model(seed=3).save_pretrained(other)
    folder = run(tmp_path / "run", str(initial), ref_model=str(other))
    assert ask(capsys, str(folder), QUESTION) == (lines(load(folder), tiny_model(seed=3)), "")
    said, _ = ask(capsys, str(folder), QUESTION, "--ref_model", str(initial))
    assert said == lines(load(folder), tiny_model())


def test_a_run_without_a_final_model_is_its_last_checkpoint(
    initial: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(tmp_path / "run", str(initial), learning_rate=3e-2, save_strategy="steps", save_steps=1)
    last = load(tmp_path / "run" / "checkpoint-3")
    assert ask(capsys, str(tmp_path / "run"), QUESTION) == (lines(last, tiny_model()), "")
    first = load(tmp_path / "run" / "checkpoint-1")
    assert ask(capsys, str(tmp_path / "run" / "checkpoint-1"), QUESTION) == (lines(first, tiny_model()), "")


def test_an_adapter_is_asked_beside_its_base(initial: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=64)
    folder = run(tmp_path / "run", str(initial), peft_config=config)
    policy = PeftModel.from_pretrained(tiny_model(), folder).eval()
    assert ask(capsys, str(folder), QUESTION) == (lines(policy, tiny_model()), "")
    (folder / "reference.json").unlink()  # any adapter
    assert ask(capsys, str(folder), QUESTION) == (lines(policy, tiny_model()), "")
    # A run that went on from this adapter was trained against it as it started.
    second = run(tmp_path / "second", str(folder))
    continued = PeftModel.from_pretrained(tiny_model(), second).eval()
    assert expected(continued) != expected(policy)
    assert ask(capsys, str(second), QUESTION) == (lines(continued, policy), "")


@pytest.mark.parametrize("adapter", [False, True])
def test_a_run_from_a_relative_path_is_asked_from_elsewhere(
    adapter: bool, initial: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(initial.parent)
    config = {"peft_config": peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=64)} if adapter else {}
    folder = run(tmp_path / "run", initial.name, **config)
    policy = PeftModel.from_pretrained(tiny_model(), folder).eval() if adapter else load(folder)
    monkeypatch.chdir("/")
    assert ask(capsys, str(folder), QUESTION) == (lines(policy, tiny_model()), "")


def test_any_model_is_asked_alone_with_a_line_on_why(initial: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said, remark = ask(capsys, str(initial), QUESTION)
    assert said == lines(tiny_model())
    assert remark == f"tether: no reference beside {initial}: it does not name one. `--ref_model` names one.\n"


@pytest.mark.parametrize(
    ("options", "remark"),
    [
        ({"reference_free": True}, "its run had a free reference, which has no model to load"),
        ({"sync_ref_model": True, "ref_model_sync_steps": 1}, "the synchronized reference has moved since"),
    ],
)
def test_a_reference_that_is_not_that_model_is_remarked(
    options: Any, remark: str, initial: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(tmp_path / "run", str(initial), **options)
    said, err = ask(capsys, str(folder), QUESTION)
    assert remark in err and err.count("\n") == 1
    assert said == lines(load(folder), None if "reference_free" in options else tiny_model())


def test_a_reference_that_is_gone_or_changed_is_remarked(
    initial: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(tmp_path / "run", str(initial))
    tiny_model(seed=5).save_pretrained(initial)
    assert "are not those that the run was trained against" in ask(capsys, str(folder), QUESTION)[1]
    initial.rename(tmp_path / "moved")
    said, err = ask(capsys, str(folder), QUESTION)
    assert said == lines(load(folder))
    assert "which cannot be loaded" in err and err.count("\n") == 1


# ---- questions and answers -------------------------------------------------------------------------------------------


def test_without_a_chat_template_the_question_is_continued(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer(chat=False).save_pretrained(tmp_path)
    assert ask(capsys, str(tmp_path), QUESTION)[0] == lines(tiny_model(), chat=False)


def test_without_a_question_it_reads_them_until_the_input_ends(
    initial: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\n\n{QUESTION}\n"))
    assert ask(capsys, str(initial))[0] == ["", f"> {QUESTION}", *lines(tiny_model())] * 2


def test_in_a_terminal_ctrl_d_ends_the_loop(
    initial: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    typed = iter([QUESTION, ""])

    def read(prompt: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", read)
    said, err = ask(capsys, str(initial))
    assert said == [*lines(tiny_model()), ""]
    assert "Ctrl-D ends" in err


def test_an_answer_in_a_terminal_stays_within_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdout", screen := Terminal())
    column = Column(tiny_tokenizer(), "policy")
    words = "the ship left the harbour before dawn and by noon " * 4
    for word in words.split():
        column.on_finalized_text(word + " ")
    column.on_finalized_text("the end.\n\nreally", stream_end=True)
    shown = screen.getvalue().splitlines()
    assert max(map(len, shown)) <= 80
    assert shown[0].startswith("policy     the ship")
    assert all(line.startswith(" " * 11) for line in shown[1:])
    assert " ".join(screen.getvalue().split()) == f"policy {words}the end. really"


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda path: path.mkdir(), "there is no model and no checkpoint in this folder"),
        (lambda path: path.write_text("model: x"), "it is a file"),
        (lambda path: None, "it cannot be loaded as a language model"),
    ],
)
def test_what_is_no_model_is_refused(
    make: Any, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = tmp_path / "thing"
    make(path)
    assert main(["ask", str(path), QUESTION]) == 2
    first = capsys.readouterr().err.splitlines()[0]
    assert first == f"tether: Cannot ask {path}: {problem}" or first.startswith(f"tether: Cannot ask {path}: {problem}")


def test_an_empty_question_is_refused(initial: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", str(initial), " "]) == 2
    assert "Cannot ask an empty question." in capsys.readouterr().err


def test_its_help_loads_no_torch() -> None:
    code = "import sys; from tether.cli import main; main(['ask', '--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "RUN|MODEL" in done.stdout and max(map(len, done.stdout.splitlines())) <= 80


def test_a_trainer_of_models_in_memory_writes_no_name(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.save_model()
    note = json.loads((tmp_path / "reference.json").read_text())
    assert note["model"] is None and note["weights"] == trainer.reference.identity.weights
