"""How far two scorings of the same tokens are apart on this device: other ways to score, faults, and other company.

Small random models with sharp predictions; `bench_numerics` and `bench_noise` are the same on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import bench_noise
import bench_numerics
import torch
from stage import Stage

from tether.reference.base import score_without_gradient
from tether.types import Response

# The last is how a GPU multiplies float32 in TF32, where that is switched on.
DTYPES = {
    "bfloat16": (torch.bfloat16, None, "highest"),
    "float32": (torch.float32, None, "highest"),
    "float32, bfloat16 autocast": (torch.float32, torch.bfloat16, "highest"),
    "tf32": (torch.float32, None, "high"),
}
LARGEST = bench_numerics.Model("llama", 512, 8, 256, 8000)


def noise(stage: Stage) -> None:
    """The same responses in other company, and scored otherwise; in each dtype."""
    for name, (dtype, autocast_dtype, precision) in DTYPES.items():
        if precision == "high" and stage.device == "cpu":
            stage.left_out[name] = "a CPU has no TF32"
            continue
        for measured in (_companies, _ways):
            run = partial(measured, stage, name, dtype, autocast_dtype)
            stage.measure(f"{measured.__name__.strip('_')}, {name}", partial(_multiplying, precision, run))


def _multiplying(precision: str, run: Callable[[], Any]) -> Any:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        return run()
    finally:
        torch.set_float32_matmul_precision(before)


def _companies(stage: Stage, name: str, dtype: torch.dtype, autocast_dtype: torch.dtype | None) -> list[dict[str, Any]]:
    shape = bench_numerics.MODELS[0] if stage.toy else LARGEST
    model = bench_numerics.make_model(shape, dtype).to(stage.device)
    score = partial(score_without_gradient, model, autocast_dtype=autocast_dtype)
    pairs = _pairs(4 if stage.toy else 24, shape.length, shape.vocab_size)
    return [{"dtype": name, "kind": "company"} | found for found in bench_noise.in_company(score, pairs)]


def _ways(stage: Stage, name: str, dtype: torch.dtype, autocast_dtype: torch.dtype | None) -> list[dict[str, Any]]:
    models = bench_numerics.MODELS[: 1 if stage.toy else None]
    dtypes = {name: (dtype, autocast_dtype)}
    rows: list[dict[str, Any]] = []
    for model in models:
        if stage.seconds_left > 0:
            rows += bench_numerics.measured(model, dtypes, stage.device)
    return bench_numerics.summary(rows)


def _pairs(num: int, longest: int, vocab_size: int) -> list[tuple[Response, Response]]:
    """Pairs of random tokens, of all lengths up to this."""
    generator = torch.Generator().manual_seed(0)

    def ids() -> tuple[int, ...]:
        length = int(torch.randint(1, longest, (), generator=generator))
        return tuple(torch.randint(5, vocab_size, (length,), generator=generator).tolist())

    prompts = [ids() for _ in range(num)]
    return [(Response(prompt, ids()), Response(prompt, ids())) for prompt in prompts]
