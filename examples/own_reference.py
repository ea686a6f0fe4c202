"""A reference of your own: any other one, which also writes down how likely it finds each pair.

python examples/own_reference.py
"""

import json
from pathlib import Path

from toy import toy_model, toy_pairs, toy_tokenizer

from tether import DPOConfig, DPOTrainer, ExplicitReference, PairBatch, Reference, ResponseLogProbs, WrappingReference


class LoggedReference(WrappingReference[Reference]):
    """Writes a line for each pair to a file: the mean log-prob per token of both responses."""

    def __init__(self, source: Reference, path: Path) -> None:
        super().__init__(source)
        self.path = path

    def log_probs(self, batch: PairBatch) -> ResponseLogProbs:
        answer = super().log_probs(batch)
        means = batch.of_responses(answer.means())
        with self.path.open("a") as lines:
            for chosen, rejected in zip(*(side.tolist() for side in means), strict=True):
                lines.write(json.dumps({"chosen": chosen, "rejected": rejected}) + "\n")
        return answer


def main(max_steps: int = 40, output_dir: str = "out/own_reference") -> None:
    path = Path(output_dir, "pairs.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    trainer = DPOTrainer(
        toy_model(),
        reference=lambda policy: LoggedReference(ExplicitReference.of_policy(policy), path),
        args=DPOConfig(output_dir, max_steps=max_steps, learning_rate=1e-3, save_strategy="no", disable_tqdm=True),
        train_dataset=toy_pairs(64),
        processing_class=toy_tokenizer(),
    )
    trainer.train()
    print(f"the reference wrote down {len(path.read_text().splitlines())} pairs")


if __name__ == "__main__":
    main()
