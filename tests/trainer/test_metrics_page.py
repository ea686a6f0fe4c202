"""docs/metrics.md names what runs log, all of it and nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft

from support.runs import make_trainer
from support.tiny import tiny_model, tiny_pairs
from tether import BEMACallback

PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"


def _logged(folder: Path, model: Any = None, **options: Any) -> set[str]:
    options |= {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": tiny_pairs(4)}
    trainer = make_trainer(folder, model, max_steps=2, **options)
    trainer.train()
    return {name for entry in trainer.state.log_history for name in entry}


def test_the_page_names_every_metric_that_runs_log_and_no_other(tmp_path: Path) -> None:
    every_step = {"sync_ref_model": True, "ref_model_sync_steps": 1}
    logged = _logged(
        tmp_path / "lora", peft_config=peft.LoraConfig(task_type="CAUSAL_LM"), report_samples=1, **every_step
    )
    logged |= _logged(tmp_path / "experts", tiny_model("mixtral"), router_aux_loss_coef=0.01)
    logged |= _logged(tmp_path / "stored", precompute_ref_log_probs=True)
    logged |= _logged(tmp_path / "bema", callbacks=[BEMACallback(update_ref_model=True)])
    cells = re.findall(r"^\| (`.*?) \|", PAGE.read_text(), flags=re.MULTILINE)
    named = {name for cell in cells for name in re.findall(r"`(.+?)`", cell)}
    assert logged - named == {f"eval_{name}" for name in named} & logged
    assert named <= logged
