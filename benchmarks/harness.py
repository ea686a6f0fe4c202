"""What every benchmark shares: models from configs, pairs shaped like real ones, timing in turns, results as data."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DATA = ROOT.parent / "shared" / "data"

# Median tokens of prompt and of each answer. All lengths are lognormal, with the spread of the real pairs, whose
# logarithms have a standard deviation of 1.0 (rejected) to 1.3 (prompts): most are short, a few are very long.
SHAPES = {"chat": (90, 30), "instructions": (180, 320), "summarisation": (400, 40)}
SPREAD = 1.0
MAX_LENGTH = 1024


def qwen2(*, vocab_size: int = 32_000) -> Any:
    """A Qwen2 of 39 M parameters in fp32, with random weights."""
    config = Qwen2Config(
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=1344,
        vocab_size=vocab_size,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
    )
    return random_model(config, "cpu", torch.float32)


def llama(size: str) -> LlamaConfig:
    """The shape of Llama 3 8B, of Llama 3.2 1B (1.2 B parameters), or a toy."""
    width, layers, heads, intermediate, vocab_size = {
        "8b": (4096, 32, 32, 14336, 128_256),
        "1b": (2048, 16, 32, 8192, 128_256),
        "toy": (64, 2, 4, 128, 512),
    }[size]
    return LlamaConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        intermediate_size=intermediate,
        vocab_size=vocab_size,
        tie_word_embeddings=size == "1b",
        max_position_embeddings=8192,
    )


def random_model(config: Any, device: str, dtype: torch.dtype) -> Any:
    """The same random weights each time, made on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def synthetic_rows(prompt: int, answer: int, count: int, *, vocab_size: int = 32_000, seed: int = 0) -> list[dict]:
    """Tokenized pairs with lognormal lengths of the given medians, cut to `MAX_LENGTH` together."""
    random = np.random.default_rng(seed)

    def ids(median: int, limit: int) -> list[int]:
        length = int(np.clip(median * np.exp(random.normal(0, SPREAD)), 4, limit))
        return random.integers(3, vocab_size, length).tolist()

    rows = []
    for _ in range(count):
        prompt_ids = ids(prompt, MAX_LENGTH * 3 // 4)
        room = MAX_LENGTH - len(prompt_ids)
        rows.append({"prompt_ids": prompt_ids, "chosen_ids": ids(answer, room), "rejected_ids": ids(answer, room)})
    return rows


def real_rows(count: int, vocab_size: int = 8_000) -> list[dict] | None:
    """The first real preference pairs, tokenized by a tokenizer trained on them; None where they are not at hand."""
    path = DATA / "preferences_en.jsonl"
    if not path.is_file():
        return None
    pairs = [json.loads(line) for line in path.read_text().splitlines()]
    texts = [message["content"] for pair in pairs for side in pair.values() for message in side]
    tokenizer = train_tokenizer(texts, vocab_size)
    rows = []
    for pair in pairs:
        prompt, chosen, rejected = (
            tokenizer("\n".join(f"{m['role']}: {m['content']}" for m in pair[side]))["input_ids"]
            for side in ("prompt", "chosen", "rejected")
        )
        if len(prompt) < MAX_LENGTH - 8:
            room = MAX_LENGTH - len(prompt)
            rows.append({"prompt_ids": prompt, "chosen_ids": chosen[:room], "rejected_ids": rejected[:room]})
    return rows[:count]


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=["<eos>", "<pad>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<eos>", pad_token="<pad>")


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer that knows every id of a model, for rows that come tokenized."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"word{number}": number for number in range(vocab_size)}, unk_token="word0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="word1", pad_token="word2")


def batches_of(rows: list[dict], size: int) -> list[list[dict]]:
    return [rows[start : start + size] for start in range(0, len(rows) - size + 1, size)]


def useful_flops(model: Any, rows: list[dict]) -> int:
    """Operations of one forward that nothing can avoid: each prompt once, no padding, response positions in the head.

    Matrix products of the layers, attention scores and values (the causal half), and the head. A backward is twice
    that; recomputation is not counted.
    """
    config = model.config
    layer_weights = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name and p.dim() == 2)
    tokens = sum(len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    responses = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    head = 2 * config.hidden_size * config.vocab_size * responses
    return int(2 * layer_weights * tokens + attention_flops(model, rows) + head)


def num_tokens(rows: list[dict]) -> int:
    """Tokens of the rows, each prompt once."""
    return sum(len(ids) for row in rows for ids in row.values())


def length_of(row: dict) -> int:
    """Tokens of a pair's longer sequence."""
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def longest_pair(rows: list[dict]) -> list[dict]:
    """A batch to warm up with: rows longer than any before are compared with the padded layout, once in a run."""
    return [max(rows, key=length_of)]


def attention_flops(model: Any, rows: list[dict]) -> float:
    """Of these, the scores and the weighted values of the attention, the causal half of each."""
    scores = 0.0
    for row in rows:
        prompt = len(row["prompt_ids"])
        scores += prompt**2 / 2
        scores += sum(len(row[side]) * (prompt + len(row[side]) / 2) for side in ("chosen_ids", "rejected_ids"))
    return 4 * scores * model.config.hidden_size * model.config.num_hidden_layers


def matmul_flops_per_second(device: str, dtype: torch.dtype) -> float:
    """The machine's rate on a large square product, best of several: the peak that a share is a share of."""
    size = 2048 if device == "cpu" else 8192
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(timed(lambda: left @ right, device) for _ in range(6))


def timed(run: Callable[[], object], device: str) -> float:
    """Seconds of one call, the device's queue emptied before and after."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def in_turns(sides: dict[str, Callable[[int], object]], count: int, device: str) -> dict[str, list[float]]:
    """Runs each side on item 0, in reverse order on item 1, and so on: a drift of the machine meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for item in range(count):
        for name, run in list(sides.items())[:: -1 if item % 2 else 1]:
            seconds[name].append(timed(lambda run=run, item=item: run(item), device))
    return seconds


def median_ratio(slow: list[float], fast: list[float]) -> float:
    """Median of the ratios item by item."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def compared(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Medians of every side, and how many times faster than each of the others Tether was."""
    return {
        "median_seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "times_faster": {n: median_ratio(t, seconds["tether"]) for n, t in seconds.items() if n != "tether"},
    }


def rates(batches: list[list[dict]], seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Medians of every side that went through the batches in turn; a prompt's tokens count with each answer."""
    tokens = [num_tokens(rows) + sum(len(row["prompt_ids"]) for row in rows) for rows in batches]
    counts = {"pairs_per_second": list(map(len, batches)), "tokens_per_second": tokens}
    return {
        name: {
            side: statistics.median(count[i % len(count)] / s for i, s in enumerate(times))
            for side, times in seconds.items()
        }
        for name, count in counts.items()
    }


def share_of_peak(
    model: Any,
    batches: list[list[dict]],
    reference: str,
    seconds: list[float],
    peak: float,
    *,
    adapter: bool = False,
) -> float:
    """Median rate of steps that went through the batches in turn, useful operations only, as a share of `peak`.

    A step is the policy's forward and backward, and the reference's forward if it runs. An adapter's base needs no
    gradient of its weights, half of a backward; an implicit reference always has one.
    """
    backward = 1 if adapter or reference == "implicit" else 2
    passes = (reference != "precomputed") + 1 + backward
    flops = [useful_flops(model, batch) * passes for batch in batches]
    return statistics.median(flops[i % len(flops)] / s for i, s in enumerate(seconds)) / peak


def line_of(result: dict[str, Any]) -> str:
    """What was measured, in one line for the terminal."""
    parts = [
        "  ".join(f"{name} {value:6.2f} s" for name, value in result["median_seconds"].items()),
        "  ".join(f"{value:4.1f}x {name}" for name, value in result["times_faster"].items()),
    ]
    if "share_of_matmul_peak" in result:
        parts.append(f"{result['share_of_matmul_peak']:.0%} of matmul peak")
    if "peak_bytes" in result:
        parts.append("  ".join(f"{name} {value / 2**30:.2f} GiB" for name, value in result["peak_bytes"].items()))
    return " | ".join(parts)


def peak_memory_of(script: str, *arguments: str) -> int:
    """Peak resident bytes of a process of its own that runs `script` with these arguments."""
    done = subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, env={**os.environ, "TQDM_DISABLE": "1"}
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return int(done.stdout.split("peak_bytes=")[-1].split()[0])


def report_peak_memory(device: str) -> None:
    """Prints this process's peak for `peak_memory_of`."""
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else _peak_resident_bytes()
    print(f"peak_bytes={peak}")


def _peak_resident_bytes() -> int:
    """Of this program: the kernel's `ru_maxrss` would start at the peak of the process that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def device_peak_bytes(run: Callable[[], object], device: str) -> int:
    """Peak bytes allocated on a GPU during a call; 0 on a CPU, which does not count them."""
    if device != "cuda":
        run()
        return 0
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated()


def host_syncs(run: Callable[[], object], device: str) -> dict[str, int] | None:
    """How often each line of Python makes the host wait for the GPU during a call; None on a CPU."""
    if device != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    syncs = (warning for warning in caught if "synchronizing CUDA operation" in str(warning.message))
    return dict(Counter(f"{'/'.join(Path(sync.filename).parts[-3:])}:{sync.lineno}" for sync in syncs))


def write_results(name: str, results: Any, device: str, *, folder: Path | None = None, **more: Any) -> Path:
    """Keeps the results as data, with date, machine and versions, and what `more` is given."""
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{device}.json"
    record = {
        "benchmark": name,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": machine(device),
        "versions": _versions(),
        **more,
        "results": results,
    }
    new = path.with_suffix(".new")
    new.write_text(json.dumps(record, indent=2) + "\n")
    new.replace(path)  # at once: counts that add up may be stopped at any time
    return path


def _versions() -> dict[str, str]:
    found = {}
    for package in ("torch", "transformers", "peft", "accelerate", "trl"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def read_results(name: str, device: str) -> list[Any]:
    """Results of an earlier run on this machine, for a benchmark that is measured in several goes."""
    path = RESULTS / f"{name}-{device}.json"
    if not path.is_file():
        return []
    record = json.loads(path.read_text())
    results: list[Any] = record["results"]
    return results if record["machine"] == machine(device) else []


def machine(device: str) -> dict[str, Any]:
    description = {"device": device, "threads": torch.get_num_threads(), "python": platform.python_version()}
    if device == "cuda":
        return description | {"name": torch.cuda.get_device_name()}
    return description | {"name": _processor(), "cores": os.cpu_count()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def each_shape(count: int, vocab_size: int = 32_000) -> Iterator[tuple[str, list[dict]]]:
    """Every shape of data with its pairs: the real ones first."""
    real = real_rows(count)
    if real is not None:
        yield "real", real
    for name, (prompt, answer) in SHAPES.items():
        yield name, synthetic_rows(prompt, answer, count, vocab_size=vocab_size)
