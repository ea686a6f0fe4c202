"""A training loop of your own: rows, scores, a reference and a loss, without the trainer.

python examples/own_loop.py
"""

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from toy import toy_model, toy_pairs, toy_tokenizer

from tether import (
    LOSSES,
    ExplicitReference,
    LossOptions,
    PairCollator,
    PairScores,
    SynchronizedReference,
    batch_of,
    score,
    tokenize_pairs,
)


def main(max_steps: int = 40) -> None:
    policy = toy_model().train()
    reference = SynchronizedReference(ExplicitReference.of_policy(policy), lambda: policy, alpha=0.6, every=16)
    rows = tokenize_pairs(Dataset.from_list(toy_pairs(8 * max_steps)), toy_tokenizer(), max_length=32)
    loader = DataLoader(rows, batch_size=8, collate_fn=PairCollator(max_length=32))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    sigmoid, options = LOSSES["sigmoid"], LossOptions(beta=0.1)
    for step, inputs in enumerate(loader, start=1):
        batch = batch_of(inputs)
        log_probs = reference.log_probs(batch)  # before the policy's forward: an implicit reference runs in the policy
        scores = PairScores.of(batch, score(policy, batch), log_probs)
        loss = sigmoid(scores, options).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        reference.advance(step)
        if step % 10 == 0 or step == max_steps:
            print(f"step {step}: loss {loss:.4f}, rewards/margins {options.beta * scores.delta.mean():+.4f}")
    print(f"the reference moved {reference.num_syncs} times")


if __name__ == "__main__":
    main()
