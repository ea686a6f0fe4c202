"""Whatever the model or the adapter: the reference is the policy at step 0, and training does not move it.

`TETHER_WRITE_DOCS=1` writes the table of docs/which-reference.md anew from what is measured here.

What else may go wrong with a reference, and where it is tested:

    shared or partly shared with the policy, in two trainers      test_shared_reference.py
    mode, adapter, `requires_grad`, hooks, random state, dropout  test_reference_contract.py
    resumed with another one                                      test_resume.py
    the gap at step 0 and the drift                               test_checks.py
    each protection taken away                                    test_protections.py
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from datasets import Dataset
from torch import nn

from support.observe import bits, same_bits
from support.tiny import tiny_model, tiny_pairs, tiny_tokenizer
from tether import DPOConfig, DPOTrainer
from tether.data.datasets import batch_of

pytestmark = pytest.mark.numerics

TABLE = Path(__file__).resolve().parents[2] / "docs" / "which-reference.md"


class Measured(NamedTuple):
    first_loss: float
    initial_gap: float
    drift: float
    reference: str


class Case(NamedTuple):
    model: Callable[[], Any]
    adapter: peft.PeftConfig | None = None
    continued: bool = False


def _lora(**options: Any) -> peft.PeftConfig:
    return peft.LoraConfig(task_type="CAUSAL_LM", **options)


def _adapter_of(name: str) -> peft.PeftConfig | None:
    """Weights in float16 are refused where they train themselves."""
    return _lora() if "float16" in name and "bfloat16" not in name else None


def _other(name: str, **options: Any) -> peft.PeftConfig:
    config: peft.PeftConfig = getattr(peft, name)(task_type="CAUSAL_LM", **options)
    return config


_QV = ["q_proj", "v_proj"]

ADAPTERS: dict[str, Callable[[], peft.PeftConfig]] = {
    "LoRA": _lora,
    "LoRA, gaussian": lambda: _lora(init_lora_weights="gaussian"),
    "LoRA, orthogonal": lambda: _lora(init_lora_weights="orthogonal"),
    "LoRA, random start": lambda: _lora(init_lora_weights=False),
    "LoRA, dropout": lambda: _lora(lora_dropout=0.5),
    "rsLoRA": lambda: _lora(use_rslora=True),
    "DoRA": lambda: _lora(use_dora=True),
    "LoRA on embeddings": lambda: _lora(target_modules=["q_proj", "embed_tokens"]),
    "LoRA on the head": lambda: _lora(target_modules=["q_proj", "lm_head"]),
    "LoRA, `modules_to_save` head": lambda: _lora(modules_to_save=["lm_head"]),
    "LoRA, `modules_to_save` embeddings": lambda: _lora(modules_to_save=["embed_tokens"]),
    "LoRA, `trainable_token_indices`": lambda: _lora(trainable_token_indices=list(range(3, 120))),
    "LoRA, `layer_replication`": lambda: _lora(layer_replication=[[0, 2], [0, 2]]),
    "LoRA, rank pattern": lambda: _lora(rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 7}),
    "PiSSA": lambda: _lora(init_lora_weights="pissa"),
    "OLoRA": lambda: _lora(init_lora_weights="olora"),
    "AdaLoRA": lambda: _other("AdaLoraConfig", target_modules=_QV, total_step=9, tinit=1, tfinal=1),
    "IA3": lambda: _other("IA3Config", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LN tuning": lambda: _other("LNTuningConfig", target_modules=["input_layernorm", "norm"]),
    "VeRA": lambda: _other("VeraConfig", target_modules=["q_proj", "o_proj"]),
    "LoHa": lambda: _other("LoHaConfig", target_modules=_QV),
    "LoKr": lambda: _other("LoKrConfig", target_modules=_QV),
    "FourierFT": lambda: _other("FourierFTConfig", target_modules=_QV, n_frequency=10),
    "OFT": lambda: _other("OFTConfig", target_modules=_QV, oft_block_size=4),
    "BOFT": lambda: _other("BOFTConfig", target_modules=_QV, boft_block_size=4),
    "HRA": lambda: _other("HRAConfig", target_modules=_QV, r=4),
    "MiSS": lambda: _other("MissConfig", target_modules=_QV, r=4),
    "VB-LoRA": lambda: _other("VBLoRAConfig", target_modules=_QV, num_vectors=20, vector_length=8, r=4),
    "SHiRA": lambda: _other("ShiraConfig", target_modules=_QV, r=4),
    "C3A": lambda: _other("C3AConfig", target_modules=_QV, block_size=8),
    "RandLora": lambda: _other("RandLoraConfig", target_modules=_QV, r=4),
    "trainable tokens": lambda: _other("TrainableTokensConfig", token_indices=list(range(3, 120))),
    "prompt tuning": lambda: _other("PromptTuningConfig", num_virtual_tokens=4),
    "prefix tuning": lambda: _other("PrefixTuningConfig", num_virtual_tokens=4),
    "P-tuning": lambda: _other("PromptEncoderConfig", num_virtual_tokens=4, encoder_hidden_size=16),
}

# Trained biases need a family that has some; experts need a mixture.
OTHER_FAMILIES: dict[str, tuple[str, Callable[[], peft.PeftConfig]]] = {
    'LoRA, `bias="all"` (GPT-2)': ("gpt2", lambda: _lora(bias="all")),
    'LoRA, `bias="lora_only"` (GPT-2)': ("gpt2", lambda: _lora(bias="lora_only")),
    "LoRA, `target_parameters` (Mixtral)": (
        "mixtral",
        lambda: _lora(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"]),
    ),
}


def eva() -> Any:
    """LoRA whose A is made from the activations of some data. (LoftQ needs bitsandbytes on a GPU.)"""
    config = _lora(init_lora_weights="eva", target_modules=_QV, r=2, eva_config=peft.EvaConfig(rho=1.0))
    model = peft.get_peft_model(tiny_model("llama"), config)
    ids = torch.randint(5, 256, (4, 24), generator=torch.Generator().manual_seed(0))
    peft.initialize_lora_eva_weights(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}] * 4)
    return model


def _cases() -> dict[str, Case]:
    cases = {name: Case(make, _adapter_of(name)) for name, make in MODELS.items()}
    cases |= {"EVA": Case(eva), "EVA, continued": Case(eva, continued=True)}
    for name, make in ADAPTERS.items():
        cases[name] = Case(lambda: tiny_model("llama"), make())
        cases[f"{name}, continued"] = Case(lambda: tiny_model("llama"), make(), continued=True)
    for name, (family, make) in OTHER_FAMILIES.items():
        cases[name] = Case(lambda family=family: tiny_model(family), make())
        cases[f"{name}, continued"] = Case(lambda family=family: tiny_model(family), make(), continued=True)
    return cases


# --- models whose memory differs from any folder ------------------------------------------------------------------


def changed_in_memory(folder: Path) -> Any:
    model = _reloaded(folder)
    _disturb(model.parameters())
    return model


def merged_adapter(folder: Path) -> Any:
    adapted = peft.get_peft_model(_reloaded(folder), _lora())
    _disturb(p for p in adapted.parameters() if p.requires_grad)
    return adapted.merge_and_unload().requires_grad_(True)  # PEFT leaves the base frozen


def resized_embeddings(folder: Path) -> Any:
    model = _reloaded(folder)
    model.resize_token_embeddings(300)
    return model


def other_rope(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model = tiny_model("llama")
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, rope_parameters={"rope_type": "default", "rope_theta": 50.0})


def other_config(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    tiny_model("llama").save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, rms_norm_eps=0.5, attention_bias=False, hidden_act="gelu")


def relative_path(folder: Path) -> Any:
    """Loaded by a name that means nothing, or another model, from where the run is started."""
    from transformers import AutoModelForCausalLM

    tiny_model("llama").save_pretrained(folder)
    with contextlib.chdir(folder.parent):
        model = AutoModelForCausalLM.from_pretrained(folder.name)
    elsewhere = folder.parent / "elsewhere"
    tiny_model("llama", seed=5).save_pretrained(elsewhere / folder.name)
    os.chdir(elsewhere)  # the test's own folder again when it ends (`working_folder`)
    return model


def cast_in_memory(dtype: torch.dtype) -> Callable[[Path], Any]:
    """`.to` rounds rotary frequencies, which a model that is loaded in this dtype keeps in fp32."""

    def cast(_: Path) -> Any:
        model = tiny_model("llama").to(dtype)
        assert model.model.rotary_emb.inv_freq.dtype == dtype
        return model

    return cast


def attention_dropout_in_the_config(_: Path) -> Any:
    """A number that the attention keeps; there is no `nn.Dropout` to switch off."""
    model = tiny_model("llama", attention_dropout=0.3)
    assert not any(isinstance(module, nn.Dropout) for module in model.modules())
    return model


def folder_overwritten(folder: Path) -> Any:
    model = _reloaded(folder)
    tiny_model("llama", seed=5).save_pretrained(folder)
    return model


def subfolder(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    tiny_model("llama", seed=5).save_pretrained(folder)
    tiny_model("llama", seed=6).save_pretrained(folder / "inner")
    return AutoModelForCausalLM.from_pretrained(folder, subfolder="inner")


def dropout_in_the_config(_: Path) -> Any:
    return tiny_model("gpt2", attn_pdrop=0.3, resid_pdrop=0.3, embd_pdrop=0.3)


def partly_frozen(_: Path) -> Any:
    model = tiny_model("llama")
    model.model.layers[0].requires_grad_(False)
    return model


IN_MEMORY: dict[str, Callable[[Path], Any]] = {
    "weights changed in memory": changed_in_memory,
    "merged adapter": merged_adapter,
    "resized embeddings": resized_embeddings,
    "loaded with another rope theta": other_rope,
    "loaded with another config": other_config,
    "folder overwritten afterwards": folder_overwritten,
    "relative path, then `chdir`": relative_path,
    "loaded from a subfolder": subfolder,
    "cast to bfloat16 in memory": cast_in_memory(torch.bfloat16),
    "cast to float16 in memory, with LoRA": cast_in_memory(torch.float16),
    "dropout in the config": dropout_in_the_config,
    "attention dropout in the config": attention_dropout_in_the_config,
    "partly frozen": partly_frozen,
}

MODELS: dict[str, Callable[[], Any]] = {
    "from a config, no folder": lambda: tiny_model("llama"),
    "tied embeddings": lambda: tiny_model("qwen2", tie_word_embeddings=True),
    "bfloat16 instance": lambda: tiny_model("llama", dtype=torch.bfloat16),
    "LoRA on a float16 instance": lambda: tiny_model("llama", dtype=torch.float16),
    "sliding window": lambda: tiny_model("mistral", sliding_window=8),
    "mixture of experts": lambda: tiny_model("mixtral"),
    "state space (padded layout)": lambda: tiny_model("mamba"),
}


def _reloaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    tiny_model("llama").save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def _disturb(parameters: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


# --- the claim -----------------------------------------------------------------------------------------------------


def measure(model: nn.Module, adapter: peft.PeftConfig | None, folder: Path, **options: Any) -> Measured:
    """Trains three steps; the reference's answers on fixed pairs before and after, and the first loss."""
    given = bits(model)
    trainer = DPOTrainer(
        model,
        args=DPOConfig(
            output_dir=str(folder / "out"),
            per_device_train_batch_size=4,
            max_steps=3,
            logging_steps=1,
            learning_rate=5e-2,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            gradient_checkpointing=False,
            disable_dropout=False,
            router_aux_loss_coef=0.0,  # it would be in the first loss of a mixture of experts
            **options,
        ),
        train_dataset=Dataset.from_list(tiny_pairs(12)),
        processing_class=tiny_tokenizer(),
        peft_config=adapter,
    )
    if adapter is None:  # a fresh adapter is put into the model, and some of them change its weights
        assert same_bits(bits(trainer.model), given), "building the trainer changed the policy"
    batch = batch_of(trainer.data_collator([trainer.train_dataset[row] for row in range(4)]))
    before = trainer.reference.log_probs(batch).values
    trained = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert any(not torch.equal(p, trained[n]) for n, p in trainer.model.named_parameters() if n in trained)
    assert trainer.reference.changed_tensors() == []
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    drift = float((trainer.reference.log_probs(batch).values - before).abs().max())
    off = getattr(trainer.reference, "adapter_is_off", None)
    reference = {None: "frozen copy", True: "adapter off", False: "adapter as it was"}[off]
    return Measured(first["loss"], first["reference/initial_gap"], drift, reference)


def _prepared(case: Case) -> tuple[nn.Module, peft.PeftConfig | None]:
    model = case.model()
    if not case.continued:
        return model, case.adapter
    adapted = peft.get_peft_model(model, case.adapter) if case.adapter is not None else model
    _disturb(p for p in adapted.parameters() if p.requires_grad)
    return adapted, None


# Mamba multiplies transposed activations. Torch makes one product of such a batch or many, depending on whether the
# weight records a gradient, and MKL may round these differently: by 3e-6 with MKL_CBWR=COMPATIBLE.
_GAP = {"state space (padded layout)": 1e-5}


@pytest.mark.parametrize("name", _cases())
def test_reference_is_the_policy_at_step_0_and_stays(name: str, tmp_path: Path) -> None:
    model, adapter = _prepared(_cases()[name])
    dropout = "dropout" in name
    measured = measure(model, adapter, tmp_path)
    if not dropout:  # with dropout in the policy its first loss is not log 2; the gap below is without
        assert abs(measured.first_loss - 0.693147) < 1e-5
    assert measured.initial_gap <= _GAP.get(name, 0)
    assert measured.drift == 0
    _record(name, measured)


@pytest.fixture
def working_folder() -> Iterator[None]:
    with contextlib.chdir(Path.cwd()):
        yield


@pytest.mark.usefixtures("working_folder")
@pytest.mark.parametrize("name", IN_MEMORY)
def test_reference_is_what_is_in_memory(name: str, tmp_path: Path) -> None:
    measured = measure(IN_MEMORY[name](tmp_path / "model"), _adapter_of(name), tmp_path)
    if "dropout" not in name:
        assert abs(measured.first_loss - 0.693147) < 1e-5
    assert measured.initial_gap == 0
    assert measured.drift == 0
    _record(name, measured)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "autocast"])
@pytest.mark.parametrize("kind", ["explicit", "adapter", "precomputed", "synchronized"])
def test_evaluate_before_train_gives_rewards_of_zero(dtype: str, kind: str, tmp_path: Path) -> None:
    rows = Dataset.from_list(tiny_pairs(8))
    trainer = DPOTrainer(
        tiny_model("llama", dtype=torch.float32 if dtype == "autocast" else getattr(torch, dtype)),
        args=DPOConfig(
            output_dir=str(tmp_path),
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=dtype == "autocast",
            sync_ref_model=kind == "synchronized",
            precompute_ref_log_probs=kind == "precomputed",
            # As in the evaluation, but for its order: the longest come first.
            precompute_ref_batch_size=8 if kind == "precomputed" else None,
        ),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tiny_tokenizer(),
        peft_config=_lora() if kind == "adapter" else _adapter_of(dtype),
        ref_model=tiny_model("llama", dtype=torch.float16) if (dtype, kind) == ("float16", "explicit") else None,
    )
    metrics = trainer.evaluate()
    # A row that stood elsewhere in its batch may be rounded otherwise, by 3e-6 under `OtherRounding(3)` in fp32.
    rounding = (1e-5 if dtype == "float32" else 0.02) if kind == "precomputed" else 0
    for name in ("margins", "chosen", "rejected"):
        assert abs(metrics[f"eval_rewards/{name}"]) <= rounding


# --- the table -------------------------------------------------------------------------------------------------------

_rows: dict[str, Measured] = {}


def _record(name: str, measured: Measured) -> None:
    _rows[name] = measured


def test_table_of_references_is_complete() -> None:
    """Runs last in this file: writes the table when asked to, and checks that it has every case."""
    if os.environ.get("TETHER_WRITE_DOCS"):
        TABLE.write_text(_table())
    text = TABLE.read_text()
    assert [name for name in [*_cases(), *IN_MEMORY] if f"| {name} |" not in text] == []


def _table() -> str:
    lines = [
        "# Which reference",
        "",
        "For every model and adapter below, measured by `tests/reference/test_which_reference.py` on tiny",
        "random models: the reference, the first loss (log 2 = 0.6931 where the policy has no dropout), the largest",
        "gap to the policy before the first step, and how far the reference moved over three steps at a large",
        "learning rate, in nats.",
        "Which of them can follow the policy instead (TR-DPO), and how: [tr-dpo.md](tr-dpo.md).",
        "",
        "| model or adapter | reference | first loss | gap at step 0 | drift |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {name} | {row.reference} | {row.first_loss:.4f} | {row.initial_gap:g} | {row.drift:g} |"
        for name, row in _rows.items()
    ]
    return "\n".join([*lines, ""])
