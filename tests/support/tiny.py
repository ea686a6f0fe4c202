"""Tiny models, tokenizers and data for the tests, and the naive oracle.

Everything here is made in memory from a seed: no download, no file. Nothing here may import `tether`, so that
what the tests compare with shares no code with what they test.
"""

from __future__ import annotations

import functools
import random
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

# ---------------------------------------------------------------------------------------------- tokenizer

EOS, PAD, BOS, UNK, TURN = "<eos>", "<pad>", "<bos>", "<unk>", "<|im_start|>"
SPECIAL_TOKENS = (EOS, PAD, BOS, UNK, TURN)  # their ids are 0 .. 4, whatever the vocabulary

CORPUS = (
    "The ship left the harbour before dawn, and by noon the coast was a thin grey line.",
    "A good answer names the reason first, then the exception, and stops there.",
    "How many legs does a spider have? A spider has eight legs; an insect has six.",
    "Write a short poem about rain. Rain on the roof, rain on the sea, rain in the dark tree.",
    "Please explain why the sky is blue. Blue light is scattered more than red light.",
    "I can't help with that, but here is what I can do: ask me about cooking or the weather.",
    "To boil an egg, put it into hot water for seven minutes and then into cold water.",
    "user assistant system 0 1 2 3 4 5 6 7 8 9 12 24 365 1984",
    "The answer is 42. The other answer is 17. Neither answer is wrong!",
    "What is the capital of France? The capital of France is Paris.",
)

# ChatML without the newline after a turn: the rendered prompt (with the generation prompt) is a prefix of the
# rendered conversation, and a response ends with the end-of-turn token, which is eos.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<eos>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@functools.cache
def _trained_tokenizer(vocab_size: int) -> str:
    """A byte-level BPE of exactly `vocab_size` tokens, as JSON.

    All 256 bytes are in the alphabet where there is room for them; below that only ASCII is, and every other
    byte becomes `<unk>`.
    """
    every_byte = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [char for char in every_byte if ord(char) < 127] + ["Ġ", "Ċ", "ĉ"]  # space, newline, tab
    alphabet = every_byte if vocab_size >= len(every_byte) + len(SPECIAL_TOKENS) else printable
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(
    vocab_size: int = 256, chat: bool = True, *, pad: bool = False, bos: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained in memory; the same one on every call, and the caller's to change.

    Args:
        vocab_size: number of tokens, at least 112. Larger ones than about 600 stay smaller: the corpus ends.
        chat: whether it has a chat template.
        pad: whether a padding token is declared. It is not by default, as for many base models.
        bos: whether `<bos>` is declared, and put in front of every text.
    """
    tokenizer = Tokenizer.from_str(_trained_tokenizer(vocab_size))
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        unk_token=UNK,
        pad_token=PAD if pad else None,
        bos_token=BOS if bos else None,
        extra_special_tokens=[TURN],
        chat_template=CHAT_TEMPLATE if chat else None,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


# -------------------------------------------------------------------------------------------------- models

Config = dict[str, Any]


def _llama_like(hidden: int, layers: int) -> Config:
    """Grouped-query attention with 4 heads over 2 key-value heads."""
    return {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }


def _head_dim(hidden: int) -> Config:
    return {"head_dim": hidden // 4}


def _alternating_windows(layers: int) -> Config:
    kinds = ["sliding_attention", "full_attention"]
    return {"sliding_window": 8, "layer_types": [kinds[layer % 2] for layer in range(layers)]}


def _family_config(family: str, hidden: int, layers: int) -> Config:
    """What a family needs beyond its defaults.

    Constants that would hide a mistake at this size (a softcap of 50, a logit scale of 1) are made to matter.
    """
    llama = _llama_like(hidden, layers)
    gemma = llama | _head_dim(hidden) | _alternating_windows(layers) | {"query_pre_attn_scalar": hidden // 4}
    routed = {"moe_intermediate_size": hidden, "num_experts_per_tok": 2, "first_k_dense_replace": 0, "n_group": 1}
    configs: dict[str, Config] = {
        "llama": llama,
        "qwen2": llama,
        "qwen3": llama | _head_dim(hidden),
        "mistral": llama | _head_dim(hidden) | {"sliding_window": None},
        "gemma2": gemma | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0},
        "gemma3_text": gemma,
        "phi3": llama,
        "gpt2": {
            "n_embd": hidden,
            "n_layer": layers,
            "n_head": 4,
            "n_positions": 512,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
        "gpt_neox": {key: value for key, value in llama.items() if key != "num_key_value_heads"},
        "opt": {
            "hidden_size": hidden,
            "word_embed_proj_dim": hidden,
            "ffn_dim": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "dropout": 0.0,
        },
        "granite": llama
        | {
            "embedding_multiplier": 2.0,
            "logits_scaling": 0.5,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.2,
        },
        "cohere2": llama | _head_dim(hidden) | _alternating_windows(layers) | {"logit_scale": 2.0},
        "olmo": llama,
        "mixtral": llama | {"num_local_experts": 4, "num_experts_per_tok": 2},
        "qwen2_moe": llama
        | {
            "moe_intermediate_size": hidden,
            "shared_expert_intermediate_size": hidden,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
        "glm4_moe": llama | _head_dim(hidden) | routed | {"n_routed_experts": 4},
        "hunyuan_v1_moe": llama | _head_dim(hidden) | {"num_experts": 4, "moe_topk": 2},
        "llama4_text": llama | _head_dim(hidden) | {"intermediate_size_mlp": hidden, "num_local_experts": 4},
        "granitemoehybrid": llama | {"layer_types": ["attention"] * layers, "num_local_experts": 4, "mamba_n_heads": 4},
        "mamba": {"hidden_size": hidden, "num_hidden_layers": layers, "state_size": 4, "time_step_rank": 4},
    }
    if family not in configs:
        raise ValueError(
            f"tiny_model(family={family!r}): there is no tiny config for it; take one of {list(configs)}, "
            "or add it in tests/support/tiny.py"
        )
    return configs[family]


FAMILIES = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt2",
    "gpt_neox",
    "opt",
    "granite",
    "cohere2",
    "olmo",
    "mixtral",
    "qwen2_moe",
    "mamba",
)

# Families that only tests of routers make: the first three give router logits and define no loss of them.
ROUTED = ("glm4_moe", "hunyuan_v1_moe", "llama4_text", "granitemoehybrid")


def tiny_model(
    family: str = "llama",
    *,
    vocab_size: int = 256,
    hidden: int = 32,
    layers: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **config_overrides: Any,
) -> PreTrainedModel:
    """A causal language model with random weights, in eval mode, whose predictions are far from uniform.

    The weights depend on `seed` and the shapes alone, and torch's global random state is left as it was. In
    another dtype they are the fp32 weights rounded. Every matrix is drawn with standard deviation
    1.7 / sqrt(hidden), and biases and norms are moved off their zeros and ones, so that leaving any of them
    out is seen.

    Args:
        family: one of `FAMILIES` or `ROUTED`. Gemma 2, Gemma 3 and Cohere 2 have a window of 8 in every other layer.
        config_overrides: fields of the family's config, for instance `sliding_window=8` for Mistral,
            `attn_pdrop=0.1` for GPT-2, `tie_word_embeddings=True`, `attn_implementation="eager"`.
    """
    fields = _family_config(family, hidden, layers) | {
        "vocab_size": vocab_size,
        "eos_token_id": SPECIAL_TOKENS.index(EOS),
        "bos_token_id": SPECIAL_TOKENS.index(BOS),
        "pad_token_id": None,
    }
    config = AutoConfig.for_model(family, **fields | config_overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        exact = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _randomize(exact, std=1.7 / hidden**0.5, seed=seed)
        if dtype == torch.float32:
            return exact.eval()
        # Not `exact.to(dtype)`, which rounds the rotary frequencies too: a loaded model keeps them in fp32.
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(exact.state_dict())
    return model.eval()


@torch.no_grad()
def _randomize(model: torch.nn.Module, std: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(std * noise if parameter.ndim > 1 else parameter.float() + 0.2 * noise)


# ---------------------------------------------------------------------------------------------------- data

_SUBJECTS = (
    "rain",
    "the harbour",
    "a spider",
    "the capital of France",
    "an egg",
    "blue light",
    "winter",
    "1984",
)
_ASKS = (
    "Explain {}.",
    "What is {}?",
    "Write a short poem about {}.",
    "Name a reason for {} and an exception.",
)
_SENTENCES = tuple(sentence + "." for text in CORPUS for sentence in text.rstrip(".!").split(". "))
_SYSTEM = "You answer in short sentences."


def tiny_pairs(num: int = 32, conversational: bool = False, seed: int = 0) -> list[dict[str, Any]]:
    """Rows `{prompt, chosen, rejected}` of varied length; every fourth row repeats the prompt before it.

    Conversational rows hold lists of messages: some with a system message, some with an earlier turn.
    """
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for index in range(num):
        prompt = rows[-1]["prompt"] if index % 4 == 3 else _draw_prompt(draw, conversational)
        chosen, rejected = _draw_response(draw), _draw_response(draw)
        while rejected == chosen:
            rejected = _draw_response(draw)
        if conversational:
            row = {"prompt": prompt, "chosen": [_said(chosen)], "rejected": [_said(rejected)]}
        else:
            row = {"prompt": prompt, "chosen": " " + chosen, "rejected": " " + rejected}
        rows.append(row)
    return rows


def _draw_prompt(draw: random.Random, conversational: bool) -> str | list[dict[str, str]]:
    if not conversational:
        return _draw_question(draw)
    messages = [{"role": "system", "content": _SYSTEM}] if draw.random() < 0.3 else []
    if draw.random() < 0.3:
        messages += [{"role": "user", "content": _draw_question(draw)}, _said(_draw_response(draw))]
    return [*messages, {"role": "user", "content": _draw_question(draw)}]


def _draw_question(draw: random.Random) -> str:
    context = draw.choice(_SENTENCES) + " " if draw.random() < 0.5 else ""
    return context + draw.choice(_ASKS).format(draw.choice(_SUBJECTS))


def _draw_response(draw: random.Random) -> str:
    return " ".join(draw.choices(_SENTENCES, k=draw.randint(1, 3)))[: draw.randint(8, 120)].rstrip()


def _said(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


# ------------------------------------------------------------------------------------------------ training

# Adam divides each gradient by its own size: with torch's epsilon of 1e-8, a weight whose gradient is nothing but
# rounding moves by the whole learning rate. Two kernels then part in 10 steps at 1e-3 by 35 times as much as with
# this one, and hardly less is learnt (measured under `rounding.py`: losses part by 1.6e-4 and 4.6e-6, of 0.67 and 0.6).
ADAM_EPSILON = 1e-3


# -------------------------------------------------------------------------------------------------- oracle


def naive_log_probs(model: torch.nn.Module, prompt_ids: Any, response_ids: Any) -> Tensor:
    """The log-probability of each response token, `[len(response)]`, by one plain forward of the sequence.

    This is what scoring means. The caller chooses train or eval mode, and whether gradients flow.
    """
    device = next(model.parameters()).device
    prompt = torch.as_tensor(prompt_ids, dtype=torch.long, device=device)
    response = torch.as_tensor(response_ids, dtype=torch.long, device=device)
    logits = model(input_ids=torch.cat([prompt, response])[None], use_cache=False).logits[0]
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    predictions = log_probs[len(prompt) - 1 : -1]  # the logits at position t speak of the token at t + 1
    return predictions.gather(-1, response[:, None])[:, 0]
