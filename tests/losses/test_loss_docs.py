"""docs/losses.md says what the code says: its tables are made from the docstrings and the table of losses.

`TETHER_WRITE_DOCS=1` writes the page anew.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tether.losses import DIVERGENCES, LOSSES, LossOptions, Objective
from tether.losses.weighting import pair_scores, policy_weights
from tether.types import PairScores

PAGE = Path(__file__).resolve().parents[2] / "docs" / "losses.md"

HEAD = """\
# Losses

`loss_type` takes one of these names or several, `loss_weights` one weight for each. Made from the docstrings in
`src/tether/losses/` by `tests/losses/test_loss_docs.py`; compared in `tests/losses/` with the equations
written out by hand, and with TRL 1.16 where it follows the paper, in values, gradients and whole runs.

`h_w = log pi_theta(y_w|x) - log pi_ref(y_w|x)` is the log-ratio of the chosen response, `h_l` that of the rejected
one, `|y|` counts tokens, `sigma` is the logistic function, `eps` is `label_smoothing`. `g` is the divergence's (below;
`g(h) = h` by default), and `z = beta (g(h_w) - g(h_l)) - m`, with `m` the row's `margin`. `r_w = beta h_w`,
`r_l = beta h_l`.

"""

TAIL = """
A column "reads" names the options that reach a loss's value. An option that no loss of a run reads is an error, not
ignored; so is a divergence with a loss that is no function of a difference of rewards, `exo_pair` without
`label_smoothing`, and `use_weighting` with a loss that sorts.

## Divergences

`f_divergence_type` (f-DPO, Wang et al. 2023, arXiv 2309.16240), with `f_alpha_divergence_coef` as `a`. In fp32 an
exponent beyond 30 goes on along its tangent, so that no loss overflows; TRL clamps it at 80, where the gradient ends,
and lets `forward_kl` overflow.

{divergences}

## What weighs tokens and pairs

- **`ld_alpha`** (LD-DPO): {ld}
- **`use_weighting`** (WPO): {wpo} TRL 1.16 cannot train `hinge` with it: its backward fails.
- **`beta_column`** names a column of the rows that is each pair's own `beta`.
- **`margin`**, a column of the rows: by how much the chosen response is better, in units of reward (`beta` times
  nats). DPO with an offset, Amini et al. 2024, arXiv 2402.10571. TRL ignores such a column.
- **`router_aux_loss_coef`**: the load-balancing loss of a mixture of experts is added with this weight; by default
  the model config's own, as in TRL. It is the model's own loss; where a model returns none (GLM-4.5, DeepSeek-V3,
  Llama 4), it is that of Switch Transformers, made of its router's logits. Logged as `aux_loss`.
- **`reference_free`**: no reference. Every response has the log-prob 0 under it, so `h = log pi_theta(y|x)`.

## What a loss is

The mean over the pairs of the whole optimizer step is taken outside: over micro-batches and processes, each pair
counts the same. Two things do not divide like that. `aot` and `aot_unpaired` sort within one micro-batch of one
process. `bco_pair` keeps a running mean of rewards; it is saved with every checkpoint (`reward_shift.json`) and
restored from it, so an interrupted run goes on bit for bit.

Single tokens are read only for `ld_alpha` (`LossOptions.needs_per_token`) and by a loss of your own that asks for
them; a sum for each response is enough for everything else.

## A loss of your own

```python
from torch import Tensor
from tether import LossOptions, PairScores


def squared(scores: PairScores, options: LossOptions) -> Tensor:
    return (options.beta * scores.delta - 1).square()  # one value per pair
```

`DPOTrainer(..., loss=squared)` takes it instead of `loss_type`. `scores` has the log-probs of both responses under
policy and reference, their lengths and the rows' margins; `tether.losses.LOSSES[name](scores, options)` is any loss of
the table, to add to your own.

- **Single tokens.** `squared.needs_tokens = True` gives `scores.tokens.chosen` and `scores.tokens.rejected`. Their
  `policy` and `reference` are the log-probs of every token, one response after another, `ids` the tokens, and
  `sums(values)` adds a value per token up to one per pair. Rows with `ref_chosen_logps` and `ref_rejected_logps` know
  sums only, and are refused with it.
- **Columns of the rows.** `loss_columns=["confidence"]` gives `scores.columns["confidence"]`, a number for each pair.
  Every set needs the column.
- **A beta for each pair.** `beta_column="beta"` reads it from the rows, for the named losses and your own:
  `options.beta` is then a tensor. Losses that sort are refused with it.

`examples/own_losses.py` has a token-weighted loss, a confidence-weighted one and one with a KL term.
"""


def paragraphs(function: Callable[..., object]) -> list[str]:
    text = inspect.getdoc(function) or ""
    return [" ".join(part.split()) for part in text.split("\n\n")]


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def losses_table() -> str:
    lines = ["| loss | what | equation | paper | reads | TRL 1.16 |", "| --- | --- | --- | --- | --- | --- |"]
    for name, loss in LOSSES.items():
        what, equation, paper, *rest = paragraphs(loss.function)
        assert equation.startswith("`") and "arXiv" in paper, name
        difference = next(
            (part.removeprefix("TRL 1.16: ") for part in rest if part.startswith("TRL 1.16: ")), "the same"
        )
        reads = ", ".join(f"`{option}`" for option in sorted(loss.takes)) or "none"
        lines.append(f"| `{name}` | " + " | ".join(map(cell, (what, equation, paper, reads, difference))) + " |")
    return "\n".join(lines) + "\n"


def divergences_table() -> str:
    lines = ["| divergence | `g(h)`, and `f(u)` of `u = pi_theta / pi_ref` |", "| --- | --- |"]
    lines += [f"| `{name}` | {cell(' '.join(paragraphs(g)))} |" for name, g in DIVERGENCES.items()]
    return "\n".join(lines)


def weighting_of(function: Callable[..., object]) -> str:
    _, equation, paper = paragraphs(function)[:3]
    return f"{equation}. {paper}"


def page() -> str:
    tail = TAIL.replace("{divergences}", divergences_table())
    tail = tail.replace("{ld}", weighting_of(pair_scores)).replace("{wpo}", weighting_of(policy_weights))
    return HEAD + losses_table() + tail


def test_the_page_is_what_the_docstrings_say() -> None:
    if os.environ.get("TETHER_WRITE_DOCS"):
        PAGE.write_text(page())
    assert PAGE.read_text() == page()


def test_a_loss_says_where_trl_differs_exactly_where_the_tests_need_an_exception() -> None:
    differing = {name for name, loss in LOSSES.items() if "TRL 1.16:" in (loss.function.__doc__ or "")}
    assert differing == {"sigmoid", "sigmoid_norm", "discopop", "bco_pair", "sft", "hypo"}


def test_the_loss_of_ones_own_on_the_page_is_one() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(block, names)
    zero, length = torch.zeros(2), torch.ones(2, dtype=torch.long)
    scores = PairScores(torch.tensor([1.0, 2.0]), zero, zero, zero, length, length)
    assert names["squared"](scores, LossOptions(0.5)).tolist() == [0.25, 0.0]  # type: ignore[operator]
    Objective([names["squared"]])  # type: ignore[list-item]


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_needs_more_of_its_reference_than_a_sum(name: str) -> None:
    """As the page says; a loss that reads single tokens would have to say so, and get them."""
    assert not LOSSES[name].needs_tokens and not LossOptions().needs_per_token
