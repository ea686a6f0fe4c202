"""Makes a small language model from nothing: a byte-level BPE tokenizer and a Qwen2 of six million parameters.

Both are trained on the texts of one file in a few minutes on a CPU. The model knows some English and nothing else; it
is there so that `tether train` has a policy to start from, offline.

    python examples/real_pairs/make_model.py --output out/base
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

ROOT = Path(__file__).resolve().parents[2]
START_OF_TURN, END_OF_TURN = "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def main() -> None:
    options = read_options()
    if not options.text.is_file():
        sys.exit(f"There is no text at {options.text}: name one with --text (text, or pairs as .jsonl).")
    torch.manual_seed(options.seed)
    documents = read_documents(options.text)
    tokenizer = train_tokenizer(documents, options.vocab_size)
    held_out = max(1, len(documents) // 20)
    train_ids = encode(tokenizer, documents[:-held_out])
    eval_ids = encode(tokenizer, documents[-held_out:])
    model = new_model(tokenizer, options)
    print(
        f"{len(documents)} documents, {len(train_ids):,} tokens to train on, {len(eval_ids):,} held out; "
        f"a vocabulary of {len(tokenizer):,}, {model.num_parameters() / 1e6:.1f} million parameters",
        flush=True,
    )
    train(model, train_ids, eval_ids, options)
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    print(f"saved to {options.output}")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pairs = ROOT / "examples" / "pairs.jsonl"
    about = "plain text, a document per line; or pairs, whose prompts and chosen answers are read [%(default)s]"
    parser.add_argument("--text", type=Path, default=pairs, help=about)
    parser.add_argument("--output", type=Path, default=Path("out/base"), help="folder to write [%(default)s]")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps [%(default)s]")
    parser.add_argument("--batch_size", type=int, default=2, help="blocks of text in a step [%(default)s]")
    parser.add_argument("--block", type=int, default=512, help="tokens in a block [%(default)s]")
    parser.add_argument("--vocab_size", type=int, default=4096, help="tokens of the tokenizer [%(default)s]")
    parser.add_argument("--hidden_size", type=int, default=256, help="width of the model [%(default)s]")
    parser.add_argument("--layers", type=int, default=6, help="depth of the model [%(default)s]")
    parser.add_argument("--learning_rate", type=float, default=1.5e-3, help="highest learning rate [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the blocks [%(default)s]")
    return parser.parse_args()


def read_documents(path: Path) -> list[str]:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if path.suffix != ".jsonl":
        return lines
    rows = [json.loads(line) for line in lines]
    return ["\n".join(turn["content"] for turn in (*row["prompt"], *row["chosen"])) for row in rows]


def train_tokenizer(documents: Sequence[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Qwen's tokenizer (a byte-level BPE, to which no text is unknown) with a vocabulary of its own."""
    tokenizer: PreTrainedTokenizerBase = Qwen2Tokenizer().train_new_from_iterator(
        documents, vocab_size, new_special_tokens=[START_OF_TURN, END_OF_TURN], show_progress=False
    )
    tokenizer.eos_token = END_OF_TURN  # documents and turns end alike; <|endoftext|> pads
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str]) -> Tensor:
    """All documents in one row of ids, each closed by the end-of-turn token."""
    ids: list[int] = []
    for document in tokenizer(list(documents))["input_ids"]:
        ids += [*document, tokenizer.eos_token_id]
    return torch.tensor(ids)


def new_model(tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace) -> PreTrainedModel:
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden_size,
        intermediate_size=3 * options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden_size // 32,
        num_key_value_heads=options.hidden_size // 64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


def train(model: PreTrainedModel, train_ids: Tensor, eval_ids: Tensor, options: argparse.Namespace) -> None:
    """Next-token training on random blocks: AdamW, warm-up, cosine decay, bf16 products."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_up_and_decay(step, options.steps))
    draw = random.Random(options.seed)
    start = time.perf_counter()
    for step in range(1, options.steps + 1):
        loss = mean_loss(model, random_blocks(train_ids, options.batch_size, options.block, draw))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step == 1 or step % max(1, options.steps // 15) == 0:
            seconds = time.perf_counter() - start
            speed = step * options.batch_size * options.block / seconds
            print(
                f"step {step:4d}/{options.steps}  loss {loss.item():.3f}  {speed:,.0f} tokens/s  {seconds:.0f} s",
                flush=True,
            )
    print(f"held-out loss {held_out_loss(model, eval_ids, options.block):.3f} nats per token")


def warm_up_and_decay(step: int, num_steps: int) -> float:
    return min(1.0, (step + 1) / max(1, num_steps // 10)) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / num_steps)))


def random_blocks(ids: Tensor, num_blocks: int, length: int, draw: random.Random) -> Tensor:
    """Blocks of `length` consecutive ids, shape (num_blocks, length)."""
    length = min(length, len(ids) - 1)
    starts = [draw.randrange(len(ids) - length) for _ in range(num_blocks)]
    return torch.stack([ids[start : start + length] for start in starts])


def mean_loss(model: PreTrainedModel, blocks: Tensor) -> Tensor:
    """Mean negative log-probability of each next token, in nats."""
    with torch.autocast("cpu", torch.bfloat16):
        loss: Tensor = model(input_ids=blocks, labels=blocks, use_cache=False).loss
    return loss


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, ids: Tensor, length: int) -> float:
    model.eval()
    blocks = [ids[start : start + length][None] for start in range(0, max(1, len(ids) - length), length)]
    return sum(mean_loss(model, block).item() for block in blocks) / len(blocks)


if __name__ == "__main__":
    main()
