"""The model card, its tags, and what is pushed: the run, its loss, and the reference it was trained against."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers.trainer
import yaml
from peft import LoraConfig

from runs import make_trainer, trained
from tether import BEMACallback, LossOptions, PairScores
from tiny import tiny_model

REFERENCES: dict[str, tuple[Callable[[], dict[str, Any]], str, str]] = {
    "frozen": (lambda: {}, "weights that stand still", "2305.18290"),
    "adapter": (lambda: {"peft_config": LoraConfig(target_modules=["q_proj"])}, "own base", "2305.18290"),
    "moving": (lambda: {"sync_ref_model": True}, "TR-DPO", "2404.09656"),
    "following": (lambda: {"callbacks": [BEMACallback(update_ref_model=True)]}, "BEMA", "2508.00180"),
}


def parts_of(folder: Path) -> tuple[dict[str, Any], str]:
    _, front, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


@pytest.mark.parametrize("kind", REFERENCES)
def test_the_card_says_who_the_reference_was_and_what_to_cite(kind: str, tmp_path: Path) -> None:
    options, about, paper = REFERENCES[kind]
    trainer = make_trainer(tmp_path, beta=0.25, loss_type=["sigmoid", "ipo"], **options())
    trainer.create_model_card()
    _, text = parts_of(tmp_path)
    identity = trainer.reference.identity
    for said in (about, f"| kind | `{kind}` |", f"| digest | `{identity.digest}` |", "| beta | `0.25` |"):
        assert said in text, said
    for cited in ("`sigmoid`", "`ipo`", "2310.12036", "rafailov2023", f"eprint = {{{paper}}}"):
        assert cited in text, cited
    assert text.count("```") % 2 == 0


def test_a_loss_of_ones_own_is_on_the_card_with_the_paper_that_it_names(tmp_path: Path) -> None:
    def pulled(scores: PairScores, options: LossOptions) -> torch.Tensor:
        """As in arXiv 2401.01234."""
        return -options.beta * scores.delta

    trainer = make_trainer(tmp_path, loss=pulled, ld_alpha=0.5, reference_free=True)
    trainer.create_model_card()
    _, text = parts_of(tmp_path)
    assert "with the loss `pulled` ([arXiv 2401.01234]" in text and "`sigmoid`" not in text
    assert "| ld_alpha | `0.5` |" in text and "use_weighting" not in text
    assert "none, so that every response is as likely as any other" in text


def test_the_card_has_the_front_matter_that_trls_has(tmp_path: Path) -> None:
    model = tiny_model()
    model.config._name_or_path = "someone/base"
    trainer = make_trainer(tmp_path / "my-run", model)
    trainer.create_model_card("given", "someone/pairs", ["mine", "dpo"])
    front, text = parts_of(tmp_path / "my-run")
    assert front == {
        "base_model": "someone/base",
        "datasets": "someone/pairs",
        "library_name": "transformers",
        "model_name": "given",
        "tags": ["generated_from_trainer", "tether", "dpo", "mine"],
    }
    assert "# Model card for given" in text and "https://huggingface.co/datasets/someone/pairs" in text


def test_a_local_model_is_not_called_one_of_the_hub(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    trainer = make_trainer(tmp_path / "run", str(tmp_path / "model"))
    trainer.create_model_card()
    front, text = parts_of(tmp_path / "run")
    assert "base_model" not in front and front["model_name"] == "run"
    assert str(tmp_path) not in text


def test_every_checkpoint_comes_with_a_card_and_the_model_with_tags(tmp_path: Path) -> None:
    trainer = trained(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    front, _ = parts_of(tmp_path)
    assert trainer.model.model_tags == ["tether", "dpo"] and {"tether", "dpo"} <= set(front["tags"])


def test_a_run_is_pushed_with_its_card_and_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[dict[str, Any]] = []

    def upload_folder(**options: Any) -> str:
        files = {path.name for path in Path(options["folder_path"]).iterdir()}
        pushed.append(options | {"files": files, "card": (Path(options["folder_path"]) / "README.md").read_text()})
        return "commit"

    hub = SimpleNamespace(create_repo=lambda name, **_: SimpleNamespace(repo_id=name), upload_folder=upload_folder)
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: hub)
    trainer = make_trainer(tmp_path, hub_model_id="someone/trained", max_steps=1)
    trainer.train()
    assert trainer.push_to_hub(tags="mine", dataset_name="someone/pairs") == "commit"
    (push,) = pushed
    assert push["repo_id"] == "someone/trained" and {"model.safetensors", "README.md"} <= push["files"]
    front = yaml.safe_load(push["card"].split("---\n")[1])
    assert front["model_name"] == "trained" and front["datasets"] == "someone/pairs"
    assert set(front["tags"]) == {"generated_from_trainer", "tether", "dpo", "mine"}
    assert 'model="someone/trained"' in push["card"]
