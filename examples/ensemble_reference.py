"""Several references as one: the mean of their log-probs, which is the geometric mean of the models.

python examples/ensemble_reference.py
"""

from dataclasses import replace

import torch
from toy import toy_model, toy_pairs, toy_tokenizer

from tether import DPOConfig, DPOTrainer, ExplicitReference, PairBatch, Reference, ReferenceIdentity, ResponseLogProbs


class EnsembleReference(Reference):
    """`log pi_ref(y|x) = mean_k log pi_k(y|x)`: training stays near all of them."""

    def __init__(self, *members: Reference) -> None:
        self.members = members

    @property
    def identity(self) -> ReferenceIdentity:
        return ReferenceIdentity.named(" and ".join(member.identity.digest for member in self.members))

    @property
    def num_passes(self) -> int:
        return sum(member.num_passes for member in self.members)

    @property
    def extra_bytes(self) -> int:
        return sum(member.extra_bytes for member in self.members)

    def log_probs(self, batch: PairBatch) -> ResponseLogProbs:
        answers = [member.log_probs(batch) for member in self.members]
        return replace(answers[0], values=torch.stack([answer.values for answer in answers]).mean(0))


def main(max_steps: int = 40, output_dir: str = "out/ensemble_reference") -> None:
    trainer = DPOTrainer(
        toy_model(),
        reference=lambda policy: EnsembleReference(
            ExplicitReference.of_policy(policy),
            ExplicitReference(toy_model(seed=1)),
        ),
        args=DPOConfig(output_dir, max_steps=max_steps, learning_rate=1e-3, save_strategy="no", disable_tqdm=True),
        train_dataset=toy_pairs(64),
        processing_class=toy_tokenizer(),
    )
    trainer.train()
    print(f"two models made {trainer.reference.num_passes} passes")


if __name__ == "__main__":
    main()
