"""What a person sees of `tether train` in a terminal of 80 columns, from the first line to the last.

Each session is a command in a terminal of its own; `sessions.txt` has what it shows. `TETHER_WRITE_SESSIONS=1` writes
that file anew, to be read before it is committed.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shlex
import struct
import sys
import termios
from pathlib import Path

import pytest

from support.tiny import tiny_model, tiny_pairs, tiny_tokenizer

SOURCE = Path(__file__).resolve().parents[2] / "src"
EXPECTED = Path(__file__).with_name("sessions.txt")
RUN = (
    "tether train --model model --train_data pairs.jsonl --eval_fraction 0.25 --per_device_train_batch_size 4 "
    "--learning_rate 1e-3 --eval_strategy steps --eval_steps 3 --logging_steps 3 --save_steps 3 --max_steps 6 "
    "--precompute_ref_log_probs --use_cpu"
)
# In this order, in one folder: a command, and what is on the screen when Ctrl-C is pressed.
SESSIONS = {
    "first run": (f"{RUN} --output_dir one", None),
    "complete store, resumed": (f"{RUN} --output_dir one --max_steps 9 --resume", None),
    "refused": (f"{RUN} --output_dir one --beta -1", None),
    "interrupted": (f"{RUN} --output_dir two --max_steps 5000", "held out 3"),
    "two processes, one bad row": (f"{RUN} --train_data bad.jsonl --output_dir two --num_processes 2", None),
    "two processes, interrupted": (f"{RUN} --output_dir three --max_steps 5000 --num_processes 2", "held out 3"),
}


@pytest.fixture(scope="module")
def screens(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("sessions")
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer(pad=True).save_pretrained(folder / "model")
    rows = tiny_pairs(16, conversational=True)
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows[5]["rejected"] = None
    (folder / "bad.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shown = {name: plain(screen(folder, *session)) for name, session in SESSIONS.items()}
    # Of two processes, either may be the first to read a file, and only one writes to the terminal.
    return {
        name: re.sub(r"Generating train split: .*\n", "", text) if "--num_processes" in SESSIONS[name][0] else text
        for name, text in shown.items()
    }


def screen(folder: Path, command: str, interrupt_at: str | None) -> str:
    """What a command leaves on an endless screen of 80 columns, and its exit code."""
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(folder)
        home = {name: str(folder / "cache") for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME")}
        paths = os.pathsep.join([str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])])
        own = home | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "80"}
        os.execve(sys.executable, [sys.executable, "-m", *shlex.split(command)], os.environ | own)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
    shown = b""
    while part := _read(terminal):
        shown += part
        if interrupt_at is not None and interrupt_at.encode() in shown:
            interrupt_at = None
            os.write(terminal, b"\x03")
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return "\n".join([*(_last_written(line) for line in shown.decode().split("\n")), f"exit code {code}"])


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # nobody writes any more
        return b""


def _last_written(line: str) -> str:
    """A line after its carriage returns: of a bar, its last state."""
    states = [state for state in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).split("\r") if state.strip()]
    return states[-1].rstrip() if states else ""


def plain(text: str) -> str:
    """A screen without what differs from one run or machine to the next: figures of models, times, sizes, digests."""
    text = re.sub(r"\|[ #\d█▉▊▋▌▍▎▏]*\|", "|####|", text)
    text = re.sub(r"[+-]?\d+\.\d{3,4}\b", lambda found: re.sub(r"\d", "0", found[0]).replace("-", "+"), text)
    for pattern, put in (
        (r"\[\d\d:\d\d.*", "[time]"),
        (r"\d+ examples \[time", "16 examples [time"),
        (r" +\d+ s$", "    0 s"),
        (r"after step \d+ of", "after step 4 of"),
        (r".*\|####\| \d+/5000 .*\n", ""),
        (r"\^C", ""),
        (r"\n\n+", "\n\n"),
        (r"epochs, \d+\.\d s", "epochs, 1.0 s"),
        (r"\d+\.\d s, [\d,]+ tokens/s", "1.0 s, 1,000 tokens/s"),
        (r"\d\.\d MB\)", "0.1 MB)"),
        (r"/\S*/cache/", "cache/"),
        (r"\b[0-9a-f]{12}\b", "0123456789ab"),
        (r"checkpoint-\d+\.", "checkpoint-N."),
    ):
        text = re.sub(pattern, put, text, flags=re.MULTILINE)
    return text


@pytest.mark.slow
def test_the_sessions_show_what_is_written_down(screens: dict[str, str]) -> None:
    found = "".join(f"== {name}\n$ {SESSIONS[name][0]}\n{shown}\n\n" for name, shown in screens.items())
    if os.environ.get("TETHER_WRITE_SESSIONS"):
        EXPECTED.write_text(found)
    assert found == EXPECTED.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", SESSIONS)
def test_lines_and_bars_fit_the_terminal(screens: dict[str, str], name: str) -> None:
    lines = screens[name].partition("tether: ")[0].splitlines()  # then comes prose, as in sentences before
    assert max((len(line) for line in lines if not line.endswith(".")), default=0) <= 80
