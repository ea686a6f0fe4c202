"""The model card, its tags, and what is pushed: the run, its loss, and the reference it was trained against."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers.trainer
import yaml
from peft import LoraConfig

from support.runs import make_trainer, trained
from support.tiny import tiny_model, tiny_tokenizer
from tether import BEMACallback, LossOptions, PairScores

REFERENCES: dict[str, tuple[Callable[[], dict[str, Any]], str, str]] = {
    "explicit": (lambda: {}, "weights that stand still", "2305.18290"),
    "implicit": (lambda: {"peft_config": LoraConfig(target_modules=["q_proj"])}, "own base", "2305.18290"),
    "synchronized": (lambda: {"sync_ref_model": True}, "TR-DPO", "2404.09656"),
    "bema": (lambda: {"callbacks": [BEMACallback(update_ref_model=True)]}, "BEMA", "2508.00180"),
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
    assert text.count("```") % 2 == 0 and "| `` |" not in text


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


@pytest.mark.parametrize("chats", [True, False])
@pytest.mark.parametrize("trains", ["model", "adapter"])
def test_the_quick_start_runs_in_the_models_folder(
    chats: bool, trains: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tiny_tokenizer()
    if not chats:
        tokenizer.chat_template = None
    tiny_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapter = {"peft_config": LoraConfig(target_modules=["q_proj"])} if trains == "adapter" else {}
    trainer = make_trainer(tmp_path / "run", str(tmp_path / "base"), processing_class=tokenizer, max_steps=1, **adapter)
    trainer.train()
    assert not (tmp_path / "run" / "README.md").exists(), "there is no model yet"
    trainer.save_model()
    _, text = parts_of(tmp_path / "run")
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert ('"role": "user"' in block) == chats and ("peft" in text.partition("## Training")[0]) == bool(adapter)
    monkeypatch.chdir(tmp_path / "run")
    capsys.readouterr()
    exec(compile(block.replace("128", "4"), "README.md", "exec"), {})
    assert capsys.readouterr().out


def test_a_model_saved_elsewhere_has_its_card_there(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run")
    trainer.save_model(str(tmp_path / "best"))
    front, _ = parts_of(tmp_path / "best")
    assert front["model_name"] == "best" and not (tmp_path / "run" / "README.md").exists()


def test_the_card_says_how_much_was_trained_on_and_with_which_adapter(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        peft_config=LoraConfig(r=4, target_modules=["v_proj", "q_proj"]),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        learning_rate=2e-5,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        max_steps=7,
    )
    trainer.create_model_card()
    _, text = parts_of(tmp_path)
    assert f"on {len(trainer.train_dataset):,} preference pairs" in text
    for row in (
        "| pairs of an optimizer step | `6 = 2 per device × 3 accumulated × 1 processes` |",
        "| learning_rate | `2e-05` |",
        "| lr_scheduler_type | `cosine` |",
        "| warmup_steps | `2` |",
        "| max_steps | `7` |",
        "| type | `LORA` |",
        "| r | `4` |",
        "| target_modules | `q_proj, v_proj` |",
    ):
        assert f"\n{row}\n" in text, row
    assert "num_train_epochs" not in text and "use_dora" not in text


def test_text_of_others_stays_text(tmp_path: Path) -> None:
    def tricky(scores: PairScores, options: LossOptions) -> torch.Tensor:
        return -scores.delta

    tricky.__name__ = "a`b|c"
    trainer = make_trainer(tmp_path, loss=tricky)
    trainer.create_model_card('mine <b>*bold*</b> "x"\n# not a heading {{ 1 + 1 }}', "someone/a b](http://x)")
    front, text = parts_of(tmp_path)
    assert front["model_name"] == 'mine <b>*bold*</b> "x"\n# not a heading {{ 1 + 1 }}'
    assert '# Model card for mine \\<b\\>\\*bold\\*\\</b\\> "x" # not a heading {{ 1 + 1 }}\n' in text
    assert "[someone/a b\\](http://x)](https://huggingface.co/datasets/someone/a%20b%5D%28http%3A//x%29)" in text
    assert "with the loss `` a`b\\|c ``" in text


def test_the_card_links_to_the_trackers_that_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = SimpleNamespace(url="https://comet.example/run")
    space = SimpleNamespace(get=lambda: "someone/space")
    for name, module in {
        "wandb": SimpleNamespace(run=SimpleNamespace(url="https://wandb.example/run 1")),
        "trackio": SimpleNamespace(context_vars=SimpleNamespace(current_space_id=space)),
        "comet_ml": SimpleNamespace(get_running_experiment=lambda: experiment),
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    trainer = make_trainer(tmp_path)
    trainer.create_model_card()
    _, text = parts_of(tmp_path)
    for link in (
        "[Weights & Biases](https://wandb.example/run%201)",
        "[Trackio](https://huggingface.co/spaces/someone/space)",
        "[Comet](https://comet.example/run)",
    ):
        assert link in text, link


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
