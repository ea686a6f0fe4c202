"""The same script under TRL and here: one import changes, and losses, metrics, keys and files stay.

Each script below is run twice, as text, with `from trl import ...` and with `from tether import ...`. What a script
leaves in `result` is compared. TRL is asked for fp32 and for runs that it gets right.
"""

from __future__ import annotations

import gc
import inspect
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from transformers import Trainer, TrainerCallback

import tether
from support.observe import bits, same_bits
from support.runs import says_rounding
from support.tiny import ADAM_EPSILON, tiny_model, tiny_pairs, tiny_tokenizer
from tether.trainer.evaluation import padded_ids
from tether.trainer.trl_attributes import ELSEWHERE

pytestmark = pytest.mark.numerics

CLOCK = ("runtime", "per_second", "preparation_time", "total_flos")
OURS = ("reference/initial_gap", "reference/noise", "pairs/tied", "pairs/total")
# Means over all tokens here; means over batches there.
TOKEN_MEANS = ("entropy", "logits/", "mean_token_accuracy")
EVALUATED = ("eval_", "again_")

START = """
from datasets import Dataset
from LIBRARY import DPOConfig, DPOTrainer

def config(**options):
    given = dict(report_to=[], bf16=False, disable_tqdm=True, logging_steps=1, save_strategy="no", max_steps=3,
                 per_device_train_batch_size=4, per_device_eval_batch_size=4, learning_rate=1e-3,
                 adam_epsilon=adam_epsilon)
    return DPOConfig(out, **{**given, **options})
"""

SCRIPTS: dict[str, str] = {
    "path, everything by default": """
trainer = DPOTrainer(model_folder, args=config(), train_dataset=rows)
trainer.train()
result = trainer.state.log_history
""",
    "every argument by position, an optimizer of your own": """
from transformers import AutoModelForCausalLM, TrainerCallback
import torch

class Counting(TrainerCallback):
    steps = 0
    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        assert model is not None and optimizer is not None
        self.steps += 1

counting = Counting()
model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 ** step)
args = config(gradient_checkpointing_kwargs={"use_reentrant": True})
trainer = DPOTrainer(model, None, args, None, rows, eval_rows, tokenizer, None, [counting],
                     (optimizer, schedule), None, None)
trainer.train()
result = [*trainer.state.log_history, trainer.evaluate(), {"steps": counting.steps}]
""",
    "a LoRA adapter, reentrant checkpointing": """
from peft import LoraConfig
args = config(gradient_checkpointing_kwargs={"use_reentrant": True}, learning_rate=1e-2)
adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
trainer = DPOTrainer(model_folder, args=args, train_dataset=rows, peft_config=adapter)
trainer.train()
result = [*trainer.state.log_history, {"ref_model": trainer.ref_model}]
""",
    "compute_metrics, before and after training": """
import numpy

def compute_metrics(given):
    logits, ids = given.predictions, given.label_ids
    seen = numpy.where(logits == -100, -numpy.inf, logits)[:, :-1]
    hits = (seen.argmax(-1) == ids[:, 1:]) & (ids[:, 1:] > 0)
    return {"hits": float(hits.sum()), "rows": float(len(ids)), "width": float(ids.shape[1]),
            "deep": float(numpy.abs(logits[:, 0]).mean()), "sum": float(ids[ids >= 0].sum())}

trainer = DPOTrainer(model_folder, args=config(gradient_checkpointing=False), train_dataset=rows,
                     eval_dataset=eval_rows, compute_metrics=compute_metrics)
before = trainer.evaluate()
trainer.train()
result = [before, trainer.evaluate(), trainer.evaluate(metric_key_prefix="again")]
""",
    "predict": """
trainer = DPOTrainer(model_folder, args=config(), train_dataset=rows, eval_dataset=eval_rows)
trainer.train()
found = trainer.predict(trainer.eval_dataset)
result = [found.metrics, {"shape": str(found.predictions.shape), "labels": str(found.label_ids.tolist()),
                          "first": float(found.predictions[0, 0, 0]), "mean": float(found.predictions[:, 0].mean())}]
""",
    "a dict of sets, early stopping, the best at the end": """
from transformers import EarlyStoppingCallback
args = config(max_steps=8, learning_rate=0.015, eval_strategy="steps", eval_steps=1, save_strategy="steps",
              save_steps=1, save_total_limit=2, load_best_model_at_end=True, metric_for_best_model="eval_some_loss")
trainer = DPOTrainer(model_folder, args=args, train_dataset=rows, eval_dataset={"some": eval_rows, "other": rows},
                     callbacks=[EarlyStoppingCallback(early_stopping_patience=2)])
trainer.train()
state = trainer.state
result = [*state.log_history, {"step": state.global_step, "best": state.best_metric,
                               "which": state.best_model_checkpoint.rpartition("/")[2]},
          {name: value for name, value in trainer.evaluate().items() if name.endswith("_loss")}]
""",
    "evaluation after training, precomputed": """
args = config(precompute_ref_log_probs=True)
trainer = DPOTrainer(model_folder, args=args, train_dataset=rows, eval_dataset=eval_rows)
trainer.train()
result = [*trainer.state.log_history, trainer.evaluate(), {"ref_model": trainer.ref_model}]
""",
    "new sets after training, a precomputed reference model": """
from transformers import AutoModelForCausalLM
import torch
other = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
with torch.no_grad():
    other.lm_head.weight.mul_(1.1)  # no path has it
trainer = DPOTrainer(model_folder, other, config(precompute_ref_log_probs=True), train_dataset=rows)
trainer.train()
result = [*trainer.state.log_history, trainer.evaluate(eval_rows)]
""",
    "a collator of your own": """
from trl.trainer.dpo_trainer import DataCollatorForPreference
collator = DataCollatorForPreference(pad_token_id=0, max_length=70, truncation_mode="keep_start")
trainer = DPOTrainer(model_folder, None, config(), collator, rows, eval_rows)
trainer.train()
result = [*trainer.state.log_history, trainer.evaluate()]
""",
    "a loss of a subclass that looks at the logits": """
class Mine(DPOTrainer):
    seen = []
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        self.seen.append(outputs.logits)
        return (2 * loss, outputs) if return_outputs else 2 * loss

trainer = Mine(model_folder, args=config(), train_dataset=rows)
trainer.train()
result = [*trainer.state.log_history, *(
    {"shape": str(tuple(logits.shape)), "first": float(logits[0, 0, 0]), "mean": float(logits[:, 0].mean()),
     "gradient": logits.requires_grad} for logits in trainer.seen)]
""",
    "a loss of a subclass over accumulated micro-batches": """
import types

class Dropped(DPOTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs)

class Added(DPOTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        return loss + 0.01 * model.lm_head.weight.square().sum()

class Own(DPOTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model.lm_head.weight.square().mean()

def bound(trainer, model, inputs, return_outputs=False, num_items_in_batch=None):
    return 3 * type(trainer).compute_loss(trainer, model, inputs)

result = []
for kind in (Dropped, Added, Own, DPOTrainer):
    args = config(gradient_accumulation_steps=2, max_grad_norm=1e9, per_device_train_batch_size=2)
    trainer = kind(model_folder, args=args, train_dataset=rows, eval_dataset=eval_rows)
    if kind is DPOTrainer:
        trainer.compute_loss = types.MethodType(bound, trainer)
    trainer.train()
    logged = [*trainer.state.log_history, trainer.evaluate()]
    figures = ("loss", "grad_norm", "num_tokens", "eval_loss", "rewards/margins")
    result += [{name: entry[name] for name in figures if name in entry} for entry in logged]
""",
    "logs of several steps, and of those that are left at the end": """
from transformers import Trainer, TrainerCallback

class AsksForALog(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= state.global_step == 5

result = []
for options in ({"max_steps": 7}, {"max_steps": 2}, {"max_steps": 2, "logging_strategy": "no"}):
    trainer = DPOTrainer(model_folder, args=config(logging_steps=3, **options), train_dataset=rows,
                         callbacks=[AsksForALog()])
    result.append(trainer.train().metrics)
    result += trainer.state.log_history
""",
    "floating-point operations, of pairs without padding": """
one_length = [row | {"chosen": row["chosen"][:20], "rejected": row["rejected"][1:21]} for row in rows
              if len(row["chosen"]) > 22 and len(row["rejected"]) > 22][:1]
trainer = DPOTrainer(model_folder, args=config(max_steps=1), train_dataset=Dataset.from_list(one_length))
trainer.train()
result = [{"flops": trainer.state.total_flos}]
""",
    "tokens that the model was fed": """
args = config(include_num_input_tokens_seen="non_padding", gradient_accumulation_steps=2)
trainer = DPOTrainer(model_folder, args=args, train_dataset=rows)
trainer.train()
logged = [entry["num_input_tokens_seen"] for entry in trainer.state.log_history if "loss" in entry]
result = [{"seen": trainer.state.num_input_tokens_seen, "logged": str(logged)}]
""",
    "a completion mask with holes": """
from trl.trainer.dpo_trainer import DataCollatorForPreference
import torch
padding = DataCollatorForPreference(pad_token_id=0)

def answers_only(examples):
    batch = padding(examples)
    batch["completion_mask"] = batch["completion_mask"] * (torch.arange(batch["input_ids"].shape[1]) % 4 > 0)
    return batch

result = []
for options in ({"loss_type": ["ipo", "sigmoid_norm"]}, {"use_weighting": True, "beta": 0.7}):
    trainer = DPOTrainer(model_folder, None, config(**options), answers_only, rows, eval_rows)
    trainer.train()
    result += [*trainer.state.log_history, trainer.evaluate()]
""",
    "a recipe of the alignment-handbook: templates by hand, everything is saved and evaluated": """
def as_text(row):
    said = {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
    prompt = [{"role": "system", "content": ""}, {"role": "user", "content": row["prompt"]}]
    start = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    whole = {side: tokenizer.apply_chat_template(prompt + said[side], tokenize=False) for side in said}
    return {"prompt": start} | {side: text.removeprefix(start) for side, text in whole.items()}

args = config(beta=0.05, lr_scheduler_type="cosine", warmup_steps=0.1, max_length=120, num_train_epochs=1, max_steps=-1,
              gradient_checkpointing_kwargs={"use_reentrant": False}, save_strategy="epoch")
trainer = DPOTrainer(model_folder, ref_model=None, args=args, train_dataset=rows.map(as_text),
                     eval_dataset=eval_rows.map(as_text), processing_class=tokenizer)
metrics = trainer.train().metrics
metrics["train_samples"] = len(rows)
trainer.log_metrics("train", metrics)
trainer.save_metrics("train", metrics)
trainer.save_state()
trainer.save_model(out)
trainer.create_model_card(dataset_name="pairs", tags=["alignment-handbook"])
figures = trainer.evaluate()
trainer.save_metrics("eval", figures)
result = [*trainer.state.log_history, metrics, figures]
""",
    "a subclass that logs, a collator of a subclass, and a schedule of beta": """
from dataclasses import dataclass
from transformers import TrainerCallback
from trl.trainer.dpo_trainer import DataCollatorForPreference

class Mine(DPOTrainer):
    num_batches = 0
    def training_step(self, *given, **options):
        self.num_batches += 1
        return super().training_step(*given, **options)
    def log(self, logs, *given, **options):
        logs["batches"] = self.num_batches
        super().log(logs, *given, **options)

@dataclass
class Shorter(DataCollatorForPreference):
    def torch_call(self, examples):
        return super().torch_call([row | {side: row[side][:9] for side in ("chosen_ids", "rejected_ids")}
                                   for row in examples])

class Schedule(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        trainer.beta = 0.1 * (1 + state.global_step)

trainer = Mine(model_folder, None, config(max_steps=4), Shorter(pad_token_id=0), rows, eval_rows, tokenizer,
               callbacks=[Schedule()])
trainer.train()
result = [*trainer.state.log_history, trainer.evaluate()]
""",
    "options of the loss and a collator that are set after construction": """
from transformers import TrainerCallback
from trl.trainer.dpo_trainer import DataCollatorForPreference

result = []
for changes in ({"label_smoothing": 0.2, "loss_types": ["robust"], "ld_alpha": 0.3},
                {"loss_types": ["hinge", "ipo"], "loss_weights": [1.0, 0.5], "beta": 0.7,
                 "data_collator": DataCollatorForPreference(pad_token_id=0, max_length=60)}):
    trainer = DPOTrainer(model_folder, args=config(), train_dataset=rows,
                         eval_dataset=eval_rows)
    for name, value in changes.items():
        setattr(trainer, name, value)
    trainer.train()
    result += [*trainer.state.log_history, trainer.evaluate()]
""",
    "what scripts read from the trainer": """
trainer = DPOTrainer(model_folder, args=config(beta=0.3, loss_type=["sigmoid", "ipo"], loss_weights=[1.0, 0.5]),
                     train_dataset=rows, eval_dataset={"held": eval_rows})
result = [{
    "beta": trainer.beta, "types": str(trainer.loss_types), "weights": str(trainer.loss_weights),
    "smoothing": trainer.label_smoothing, "precompute": trainer.precompute_ref_logps,
    "prompt": str(trainer.train_dataset[5]["prompt_ids"]), "chosen": str(trainer.train_dataset[5]["chosen_ids"]),
    "rejected": str(trainer.eval_dataset["held"][1]["rejected_ids"]), "pad": trainer.processing_class.pad_token,
    "ref": sum(p.double().abs().sum().item() for p in trainer.ref_model.parameters()),
    "ref_trains": any(p.requires_grad for p in trainer.ref_model.parameters() if not p.requires_grad),
    "output_dir": trainer.args.output_dir.rpartition("/")[2],
}]
""",
    "the average of the weights": """
from LIBRARY import BEMACallback
from safetensors.torch import load_file
average = BEMACallback(update_freq=2, update_after=1, lag=3, min_ema_multiplier=0.4)
args = config(max_steps=6, learning_rate=1e-2)
trainer = DPOTrainer(model_folder, args=args, train_dataset=rows, callbacks=[average])
trainer.train()
weights = load_file(out + "/bema/model.safetensors")
running = dict(average.running_model.named_parameters())
result = [{name: float(weight.double().norm()) for name, weight in weights.items()},
          {name: float(weight.double().sum()) for name, weight in running.items()},
          {name: float(weight.double().sum()) for name, weight in zip(average.param_names, average.theta0_params)},
          {name: float(weight.double().sum()) for name, weight in zip(average.param_names, average.ema_params)}]
""",
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer(pad=True).save_pretrained(folder)
    return str(folder)


def ran(script: str, library: str, model_folder: str, out: Path) -> list[dict[str, Any]]:
    names: dict[str, Any] = {
        "model_folder": model_folder,
        "out": str(out / library / "out"),
        "rows": Dataset.from_list(tiny_pairs(24)),
        "eval_rows": Dataset.from_list(tiny_pairs(8, seed=1)),
        "tokenizer": tiny_tokenizer(pad=True),
        "adam_epsilon": ADAM_EPSILON,
    }
    exec(compile((START + script).replace("LIBRARY", library), f"script for {library}", "exec"), names)
    result: list[dict[str, Any]] = names["result"]
    return [{key: value for key, value in entry.items() if not any(word in key for word in CLOCK)} for entry in result]


def under_their_set(entry: dict[str, Any]) -> dict[str, Any]:
    """TRL's figures with the prefix that was asked for: but for the loss, it writes `eval_` whatever the set is."""
    prefix = next((key.removesuffix("_loss") for key in entry if key.endswith("_loss") and key != "train_loss"), None)
    if prefix in (None, "eval", "test") or sum(key.endswith("_loss") for key in entry) > 1:
        return entry
    own = f"{prefix}_"
    return {
        key if key.startswith(own) or not key.startswith("eval_") else own + key.removeprefix("eval_"): value
        for key, value in entry.items()
    }


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_gives_the_same_under_both(name: str, model_folder: str, tmp_path: Path) -> None:
    theirs, ours = (ran(SCRIPTS[name], library, model_folder, tmp_path) for library in ("trl", "tether"))
    assert len(ours) == len(theirs)
    for number, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        their = under_their_set(their)
        more = {key for key in our if key.startswith("test_")}  # `predict` there gives the loss alone
        more |= {key for key in our if key.endswith(OURS)}
        assert our.keys() - more == their.keys() - more, number
        for key, value in their.items():
            if says_rounding(their, key) or (any(word in key for word in TOKEN_MEANS) and key.startswith(EVALUATED)):
                continue
            expected = pytest.approx(value, rel=1e-4, abs=1e-4) if isinstance(value, float) else value
            assert our[key] == expected, (number, key)


def of_trls_example(library: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The log of the script that TRL ships, run with these words on its command line."""
    text = Path(trl.__file__).with_name("scripts").joinpath("dpo.py").read_text(encoding="utf-8")
    changed = text.replace("from trl import", f"from {library} import")
    with monkeypatch.context() as patch:
        if library == "tether":
            patch.setitem(sys.modules, "trl", None)  # an import of it fails
        patch.setattr(sys, "argv", ["dpo.py", *words])
        exec(compile(changed, "dpo.py", "exec"), {"__name__": "__main__"})
    out = Path(words[words.index("--output_dir") + 1])
    assert list(out.glob("adapter_model.safetensors"))
    log: list[dict[str, Any]] = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    return [{key: value for key, value in entry.items() if not any(word in key for word in CLOCK)} for entry in log]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_trls_own_script_runs_with_its_import_changed_and_trl_gone(
    model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split, count in (("train", 12), ("test", 4)):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in tiny_pairs(count, seed=count)))
    words = (
        f"--dataset_name {tmp_path} --model_name_or_path {model_folder} --learning_rate 1e-2 --max_steps 2 "
        "--per_device_train_batch_size 2 --gradient_accumulation_steps 2 --eval_strategy steps --eval_steps 1 "
        "--use_peft --lora_r 4 --lora_alpha 16 --logging_steps 1 --save_steps 2 --report_to none --bf16 false "
        f"--disable_tqdm true --no_remove_unused_columns --adam_epsilon {ADAM_EPSILON}"
    ).split()
    runs = [of_trls_example(n, [*words, "--output_dir", str(tmp_path / n)], monkeypatch) for n in ("trl", "tether")]
    for their, our in zip(*runs, strict=True):
        assert not their.keys() - our.keys()
        for key, value in their.items():
            if not (says_rounding(their, key) or any(word in key for word in TOKEN_MEANS)):
                assert our[key] == pytest.approx(value, rel=1e-4, abs=1e-4), key


# ------------------------------------------------------------------------------------------------- the checklist


def parameters_of(trainer: Any) -> list[str]:
    named = inspect.signature(trainer.__init__).parameters.values()
    return [p.name for p in named if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"]


def test_the_constructor_takes_the_arguments_of_trl_in_its_order_and_no_other_by_position() -> None:
    assert parameters_of(tether.DPOTrainer) == parameters_of(trl.DPOTrainer)
    ours, theirs = (inspect.signature(t.__init__).parameters for t in (tether.DPOTrainer, trl.DPOTrainer))
    assert {name: ours[name].default for name in theirs} == {name: p.default for name, p in theirs.items()}


METHODS = ("evaluate", "predict", "compute_loss", "prediction_step", "log", "create_model_card", "push_to_hub")


def test_methods_take_the_arguments_of_trl_in_its_order() -> None:
    for name in METHODS:
        ours, theirs = (getattr(library.DPOTrainer, name) for library in (tether, trl))
        assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters), name


def test_every_public_attribute_of_trls_trainer_is_here_or_named(model_folder: str, tmp_path: Path) -> None:
    theirs, ours = (
        library.DPOTrainer(
            model_folder,
            args=library.DPOConfig(str(tmp_path / library.__name__), bf16=False, report_to=[]),
            train_dataset=Dataset.from_list(tiny_pairs(8)),
        )
        for library in (trl, tether)
    )
    missing = {name for name in dir(theirs) if not name.startswith("_") and not hasattr(ours, name)}
    assert missing == {name for name in ELSEWHERE if not name.startswith("_")}
    for name in ELSEWHERE:
        assert hasattr(theirs, name)
        with pytest.raises(AttributeError, match=name) as caught:
            getattr(ours, name)
        assert isinstance(caught.value, tether.errors.NotHereError) and caught.value.instead
    for name in ("router_aux_loss_coef", "aux_loss_enabled"):
        assert getattr(ours, name) == getattr(theirs, name)
    with pytest.raises(AttributeError, match="no attribute 'bta'"):
        _ = ours.bta
    with pytest.raises(tether.errors.NotHereError, match="loss=function"):  # in a subclass's `compute_loss`, say
        _ = ours.dpo_loss


def test_a_subclass_that_replaces_what_only_trl_calls_is_refused_with_all_of_it(tmp_path: Path) -> None:
    replaced = ("_compute_loss", "_prepare_dataset", "_precompute_ref_logps", "compute_ref_log_probs")
    assert all(hasattr(trl.DPOTrainer, name) for name in replaced)
    former = ("dpo_loss", "concatenated_forward", "get_batch_loss_metrics", "get_batch_logps", "concatenated_inputs")
    for name in (*replaced, *former, "tokenize_row", "store_metrics", "_tokenize", "_prepare_peft_model"):
        with pytest.raises(ValueError, match=f"`Mine.{name}`: only TRL's trainer calls") as caught:
            type("Mine", (tether.DPOTrainer,), {name: lambda self, *given: None})()
        assert isinstance(caught.value, tether.errors.ConfigurationError) and caught.value.instead

    class Bypasses(tether.DPOTrainer):  # as LLaMA-Factory's trainer does
        def __init__(self, model: Any, ref_model: Any = None, **given: Any) -> None:
            self.ref_model, self.beta = ref_model, 0.1
            Trainer.__init__(self, model=model, **given)

    class Former(Bypasses):
        def concatenated_forward(self) -> None: ...
        def get_batch_loss_metrics(self) -> None: ...

    with pytest.raises(ValueError, match=r"`Former\.concatenated_forward` and `Former\.get_batch_loss_metrics`"):
        Former(tiny_model())
    with pytest.raises(AttributeError, match=r"`trainer\.ref_model`") as refused:
        Bypasses(tiny_model())
    assert "reference=" in str(refused.value)
    Bypasses.ref_model = None  # type: ignore[assignment, method-assign]
    with pytest.raises(tether.errors.NotHereError, match=r"`DPOTrainer\.__init__` was not called"):
        Bypasses(tiny_model())


# What TRL refuses, and with which builtin; a script's `except` must go on working.
REFUSED: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "no train_dataset": (ValueError, {"train_dataset": None}),
    "a train_dataset of another kind": (TypeError, {"train_dataset": {"prompt": []}}),
    "a processing_class of another kind": (TypeError, {"processing_class": "tokenizer"}),
    "a peft_config of another kind": (TypeError, {"peft_config": {"r": 4}}),
    "the policy as its own reference": (ValueError, {"ref_model": "the policy"}),
    "an instance to quantize": (ValueError, {"quantization_config": object()}),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("library", [trl, tether], ids=lambda library: library.__name__)
def test_what_trl_refuses_is_refused_with_the_same_builtin(library: Any, name: str, tmp_path: Path) -> None:
    kind, options = REFUSED[name]
    model = tiny_model()
    given = {"train_dataset": Dataset.from_list(tiny_pairs(4)), "processing_class": tiny_tokenizer()} | options
    if given.get("ref_model") == "the policy":
        given["ref_model"] = model
    with pytest.raises(kind) as caught:
        library.DPOTrainer(model, args=library.DPOConfig(str(tmp_path), bf16=False, report_to=[]), **given)
    if library is tether:
        assert isinstance(caught.value, tether.errors.TetherError) and caught.value.instead


def test_a_subclass_adds_its_own_tags(model_folder: str, tmp_path: Path) -> None:
    class Mine(tether.DPOTrainer):
        _tag_names = [*tether.DPOTrainer._tag_names, "mine"]  # noqa: RUF012

    args = tether.DPOConfig(str(tmp_path), report_to=[], disable_tqdm=True)
    trainer = Mine(model_folder, args=args, train_dataset=tiny_pairs(4))
    trainer.create_model_card()
    assert (
        trainer.model.model_tags == ["tether", "dpo", "mine"] and "\n- mine\n" in (tmp_path / "README.md").read_text()
    )
    assert type(trl.DPOTrainer._tag_names) is type(tether.DPOTrainer._tag_names)


def test_a_policy_that_is_made_anew_for_each_run_is_refused(model_folder: str, tmp_path: Path) -> None:
    args = tether.DPOConfig(str(tmp_path), report_to=[], disable_tqdm=True)
    trainer = tether.DPOTrainer(model_folder, args=args, train_dataset=tiny_pairs(4))
    trainer.model_init = tiny_model
    with pytest.raises(ValueError, match="model_init") as caught:
        trainer.train()
    assert isinstance(caught.value, tether.errors.ConfigurationError) and "each trial" in caught.value.instead
    with pytest.raises(tether.errors.ConfigurationError, match=r"Cannot call `trainer\.hyperparameter_search`: "):
        trainer.hyperparameter_search(direction="minimize")  # before a backend is asked for


def test_trls_command_line_parser_reads_our_options(tmp_path: Path) -> None:
    words = ["--output_dir", str(tmp_path), "--beta", "0.3", "--loss_type", "sigmoid", "ipo", "--bf16", "false"]
    parsers = (trl.TrlParser((library.DPOConfig,)) for library in (trl, tether))
    theirs, ours = (parser.parse_args_and_config(args=words)[0] for parser in parsers)
    for name in ("output_dir", "beta", "loss_type", "bf16", "learning_rate", "gradient_checkpointing", "max_length"):
        assert getattr(ours, name) == getattr(theirs, name), name


# ------------------------------------------------------------------------------------- where we work and TRL raises


def test_a_reference_model_in_memory_is_not_kept_alive_for_new_sets(model_folder: str, tmp_path: Path) -> None:
    args = tether.DPOConfig(
        str(tmp_path), precompute_ref_log_probs=True, max_steps=1, report_to=[], disable_tqdm=True, save_strategy="no"
    )
    other = tiny_model(seed=3)
    trainer = tether.DPOTrainer(model_folder, other, args, train_dataset=tiny_pairs(8))
    trainer.train()
    assert trainer.evaluate(tiny_pairs(3, seed=1))["eval_rewards/margins"] != 0
    with torch.no_grad():
        other.lm_head.weight.mul_(1.1)
    with pytest.raises(LookupError, match="`ref_model` in memory has other weights by now"):
        trainer.evaluate(tiny_pairs(3, seed=2))
    del other
    gc.collect()
    with pytest.raises(LookupError, match="`ref_model` in memory cannot be read"):
        trainer.evaluate(tiny_pairs(3, seed=2))


def test_rows_of_text_can_be_predicted_at_any_time(model_folder: str, tmp_path: Path) -> None:
    args = tether.DPOConfig(str(tmp_path), max_steps=1, report_to=[], disable_tqdm=True, save_strategy="no")
    trainer = tether.DPOTrainer(model_folder, args=args, train_dataset=tiny_pairs(8))
    before = trainer.predict(tiny_pairs(3, seed=2))
    assert before.metrics["test_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert before.predictions.shape[::2] == (6, 256) and before.label_ids.shape == before.predictions.shape[:2]
    trainer.train()
    assert trainer.predict(Dataset.from_list(tiny_pairs(3, seed=2))).metrics["test_rewards/margins"] != 0


def test_beta_set_by_a_callback_holds_from_the_next_step_on(model_folder: str, tmp_path: Path) -> None:
    class Doubling(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer.beta *= 2

    def rewards(callbacks: list[Any]) -> list[float]:
        nonlocal trainer
        options: dict[str, Any] = {"learning_rate": 0.0, "logging_steps": 1, "max_steps": 3, "save_strategy": "no"}
        args = tether.DPOConfig(str(tmp_path), report_to=[], disable_tqdm=True, **options)
        other = tiny_model(seed=3)
        trainer = tether.DPOTrainer(model_folder, other, args, train_dataset=tiny_pairs(24), callbacks=callbacks)
        trainer.train()
        return [entry["rewards/margins"] for entry in trainer.state.log_history if "loss" in entry]

    trainer: Any = None
    plain, doubled = rewards([]), rewards([Doubling()])
    assert doubled == pytest.approx([plain[0], 2 * plain[1], 4 * plain[2]], rel=1e-5)
    with pytest.raises(ValueError, match="positive"):
        trainer.beta = 0.0
    with pytest.raises(AttributeError, match="read only"):
        trainer.padding_free = True


def test_options_of_the_loss_can_be_set_and_are_checked(model_folder: str, tmp_path: Path) -> None:
    trainer = tether.DPOTrainer(
        model_folder, args=tether.DPOConfig(str(tmp_path), report_to=[]), train_dataset=tiny_pairs(4)
    )
    for name, value, message in (
        ("loss_types", ["sigmoidd"], "Did you mean `sigmoid`"),
        ("loss_weights", [1.0, 2.0], "there is one loss"),
        ("ld_alpha", 2.0, "weight of the tokens"),
        ("label_smoothing", "a lot", "valid number"),
        ("beta", 0.0, "positive"),
    ):
        former = getattr(trainer, name)
        with pytest.raises(ValueError, match=message):
            setattr(trainer, name, value)
        assert getattr(trainer, name) == former
    with pytest.raises(AttributeError, match="reference="):
        trainer.ref_model = tiny_model()
    trainer.loss_type = "ipo"  # as TRL's trainer once had it
    assert trainer.loss_types == trainer.loss_type == trainer.args.loss_type == ["ipo"]
    own = tether.DPOTrainer(
        model_folder,
        args=tether.DPOConfig(str(tmp_path), report_to=[]),
        train_dataset=[{**row, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for row in tiny_pairs(4)],
        loss=lambda scores, options: options.beta * scores.delta,
    )
    with pytest.raises(ValueError, match="takes the place"):
        own.loss_types = ["ipo"]
    with pytest.raises(ValueError, match="knows sums only"):
        own.ld_alpha = 0.5


def test_a_batch_without_padding_says_where_padded_tensors_are(model_folder: str, tmp_path: Path) -> None:
    args = tether.DPOConfig(str(tmp_path), report_to=[], dataloader_num_workers=1)
    trainer = tether.DPOTrainer(model_folder, args=args, train_dataset=tiny_pairs(4))
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    with pytest.raises(KeyError, match="Cannot read `input_ids` of a batch") as caught:
        inputs["input_ids"]
    assert "padded_ids(inputs['batch'], pad_token_id)" in str(caught.value)
    ids = padded_ids(inputs["batch"], 0)
    assert ids.shape[0] == 2 * inputs["batch"].num_pairs


def test_an_optimizer_by_class_is_that_optimizer(model_folder: str, tmp_path: Path) -> None:
    weights = []
    for by_class in (True, False):
        model, options = tiny_model(), {"lr": 0.05, "momentum": 0.5}
        args = tether.DPOConfig(
            str(tmp_path),
            max_steps=3,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            lr_scheduler_type="constant",
        )
        schedule_of = torch.optim.lr_scheduler.ConstantLR
        if by_class:
            given: dict[str, Any] = {"optimizer_cls_and_kwargs": (torch.optim.SGD, options)}
        else:
            optimizer = torch.optim.SGD(model.parameters(), **options)
            given = {"optimizers": (optimizer, schedule_of(optimizer, factor=1.0))}
        trainer = tether.DPOTrainer(
            model, args=args, train_dataset=tiny_pairs(12), processing_class=tiny_tokenizer(), **given
        )
        trainer.train()
        assert type(trainer.optimizer.optimizer) is torch.optim.SGD
        weights.append(bits(model))
    assert same_bits(*weights) and not same_bits(weights[0], bits(tiny_model()))


def test_noise_of_neftune_has_the_size_that_a_sequence_alone_would_give_it(model_folder: str, tmp_path: Path) -> None:
    """Jain et al. 2023, arXiv 2310.05914: uniform within `alpha / sqrt(L d)`, L the length of a padded sequence."""
    alpha, width = 5.0, 32
    args = tether.DPOConfig(
        str(tmp_path), max_steps=1, report_to=[], disable_tqdm=True, save_strategy="no", neftune_noise_alpha=alpha,
        per_device_train_batch_size=4, gradient_checkpointing=False, logging_steps=1,
    )  # fmt: skip
    trainer = tether.DPOTrainer(model_folder, args=args, train_dataset=tiny_pairs(4))
    longest = max(
        len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in trainer.train_dataset
    )
    embedding, noise = trainer.model.get_input_embeddings(), []

    def measure(module: Any, inputs: Any, output: torch.Tensor) -> None:
        noise.append((output - torch.nn.functional.embedding(inputs[0], module.weight)).detach().abs().max().item())

    trainer.add_callback(Hooking(embedding, measure))
    trainer.train()
    bound = alpha / (longest * width) ** 0.5
    seen = [size for size in noise if size > 0]
    assert len(seen) == 1, "the policy's one forward in training, and no pass of the reference"
    assert 0.98 * bound < seen[0] <= bound
    assert trainer.state.log_history[0]["reference/initial_gap"] < 1e-5


class Hooking(TrainerCallback):
    """Hooks a module once training has put its own hooks there."""

    def __init__(self, module: torch.nn.Module, hook: Any) -> None:
        self.module, self.hook = module, hook

    def on_step_begin(self, *given: Any, **options: Any) -> None:
        self.module.register_forward_hook(self.hook)


def test_torch_compile_gives_the_same_curve(model_folder: str, tmp_path: Path) -> None:
    curves = []
    for options in ({}, {"torch_compile_backend": "eager"}):
        torch._dynamo.reset()
        args = tether.DPOConfig(
            str(tmp_path), max_steps=3, logging_steps=1, learning_rate=1e-3, report_to=[], disable_tqdm=True,
            save_strategy="no", per_device_train_batch_size=4, **options,
        )  # fmt: skip
        trainer = tether.DPOTrainer(model_folder, args=args, train_dataset=tiny_pairs(12))
        assert args.torch_compile == bool(options)
        trainer.train()
        curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert curves[1] == pytest.approx(curves[0], abs=1e-5)
