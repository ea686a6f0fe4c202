"""The helpers of the tests are themselves right: models, tokenizer, pairs and the oracle."""

from __future__ import annotations

import pytest
import torch

from support.tiny import EOS, FAMILIES, naive_log_probs, tiny_model, tiny_pairs, tiny_tokenizer

PROMPT, RESPONSE = list(range(5, 25)), list(range(40, 57))


def full_loss(model: torch.nn.Module, prompt: list[int], response: list[int]) -> torch.Tensor:
    ids = torch.tensor([prompt + response])
    labels = torch.tensor([[-100] * len(prompt) + response])
    return model(input_ids=ids, labels=labels, use_cache=False).loss


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_naive_log_probs_are_the_loss_of_the_model(family: str) -> None:
    model = tiny_model(family)
    log_probs = naive_log_probs(model, PROMPT, RESPONSE)
    assert log_probs.shape == (len(RESPONSE),) and log_probs.dtype == torch.float32
    torch.testing.assert_close(-log_probs.mean(), full_loss(model, PROMPT, RESPONSE))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_tiny_model_predicts_far_from_uniform(family: str) -> None:
    probabilities = tiny_model(family)(torch.tensor([PROMPT])).logits.float().softmax(-1)
    entropy = -(probabilities * probabilities.clamp_min(1e-30).log()).sum(-1).mean().item()
    assert 0.3 < entropy < 5.0  # uniform would be log(256) = 5.55


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_tiny_model_depends_on_the_whole_prompt(family: str) -> None:
    model = tiny_model(family)
    near = naive_log_probs(model, PROMPT, RESPONSE)
    far = naive_log_probs(model, [PROMPT[0] + 100, *PROMPT[1:]], RESPONSE)
    assert (near - far).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_model_is_determined_by_its_seed(family: str) -> None:
    one = tiny_model(family).state_dict()
    torch.rand(1)  # whatever the global random state
    same, other = tiny_model(family).state_dict(), tiny_model(family, seed=1).state_dict()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_model_leaves_the_global_random_state_alone(family: str) -> None:
    before = torch.get_rng_state()
    tiny_model(family)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_model_in_bfloat16_is_the_rounded_one(family: str) -> None:
    exact, rounded = tiny_model(family), tiny_model(family, dtype=torch.bfloat16)
    for (name, weight), (_, other) in zip(exact.named_parameters(), rounded.named_parameters(), strict=True):
        assert torch.equal(weight.to(other.dtype), other), name
    for (name, buffer), (_, other) in zip(exact.named_buffers(), rounded.named_buffers(), strict=True):
        if name.endswith("inv_freq"):
            assert torch.equal(buffer, other), name


@torch.no_grad()
def test_tiny_model_takes_overrides_of_its_config() -> None:
    wide, narrow = tiny_model("mistral"), tiny_model("mistral", sliding_window=8)
    gap = naive_log_probs(wide, PROMPT, RESPONSE) - naive_log_probs(narrow, PROMPT, RESPONSE)
    assert gap.abs().max() > 1e-2
    dropped = tiny_model("gpt2", attn_pdrop=0.5).train()
    assert not torch.equal(naive_log_probs(dropped, PROMPT, RESPONSE), naive_log_probs(dropped, PROMPT, RESPONSE))


def test_tiny_model_refuses_a_family_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="no tiny config"):
        tiny_model("nothing")


@pytest.mark.parametrize("vocab_size", [256, 384])
def test_tiny_tokenizer_has_the_size_asked_for_and_round_trips(vocab_size: int) -> None:
    tokenizer = tiny_tokenizer(vocab_size)
    assert len(tokenizer) == vocab_size
    assert tokenizer.pad_token is None and tokenizer.bos_token is None and tokenizer.eos_token == EOS
    assert tokenizer.eos_token_id == tiny_model(vocab_size=vocab_size).config.eos_token_id
    text = "Why 12 eggs?\n\tBecause: {a_b} ~ [c]!"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tiny_tokenizer_with_all_bytes_knows_every_character() -> None:
    text = "naïve Zürich 東京 🙂"
    assert (tokenizer := tiny_tokenizer(384)).decode(tokenizer(text).input_ids) == text
    assert tiny_tokenizer().unk_token_id in tiny_tokenizer()(text).input_ids


def test_tiny_tokenizer_is_the_same_each_time_and_not_shared() -> None:
    changed = tiny_tokenizer()
    changed.pad_token = changed.eos_token
    assert tiny_tokenizer().pad_token is None
    assert tiny_tokenizer().get_vocab() == changed.get_vocab()


def test_tiny_tokenizer_declares_bos_and_pad_when_asked() -> None:
    tokenizer = tiny_tokenizer(bos=True, pad=True)
    assert tokenizer("The ship").input_ids[0] == tokenizer.bos_token_id
    assert tokenizer.pad_token_id == 1
    assert tiny_tokenizer(chat=False).chat_template is None


def test_chat_template_renders_the_prompt_as_a_prefix_and_ends_with_eos() -> None:
    tokenizer = tiny_tokenizer()
    for row in tiny_pairs(conversational=True):
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True).input_ids
        whole = tokenizer.apply_chat_template(row["prompt"] + row["chosen"]).input_ids
        assert whole[: len(prompt)] == prompt and len(whole) > len(prompt)
        assert whole[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("conversational", [False, True])
def test_tiny_pairs_vary_share_prompts_and_repeat(conversational: bool) -> None:
    rows = tiny_pairs(64, conversational)
    assert rows == tiny_pairs(64, conversational) != tiny_pairs(64, conversational, seed=1)
    assert all(row.keys() == {"prompt", "chosen", "rejected"} and row["chosen"] != row["rejected"] for row in rows)
    assert len({str(row["prompt"]) for row in rows}) < len(rows)
    assert len({len(str(row["chosen"])) for row in rows}) > 10
