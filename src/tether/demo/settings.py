"""Every number of the demo, in one place."""

from __future__ import annotations

from dataclasses import dataclass

from tether.demo.pretrain import ModelSize


@dataclass(frozen=True)
class DemoSettings:
    """The size of the demo and its training parameters.

    Attributes:
        word_lengths: Letters of the made-up words.
        right_share: Share of right answers among the pretraining texts.
        num_held_out: Prompts used for measuring, each answered `held_out_samples` times.
        model_size: The shape of the language model.
        num_pretraining: Texts; `pretraining_steps` steps draw `pretraining_batch` of them each.
        num_preference: Prompts that are answered `samples_per_prompt` times each to find pairs.
        batch_size: Pairs of an optimizer step of DPO; every pair is seen once.
        beta: Strength of the pull towards the reference. Larger than the usual 0.1, since a tiny model forgets fast:
            in trials with 0.1 it moved more than 5 nats and lost right answers along with wrong ones.
        warmup_steps: Steps of warm-up; the learning rate then decays to 0.
        learning_rate: Of full fine-tuning; `lora_learning_rate` is the adapter's, of rank `lora_rank`.
        sync_alpha: Weight of the policy in each sync of the synchronized reference, every `sync_steps` steps.
    """

    word_lengths: tuple[int, ...] = (4, 5, 6)
    right_share: float = 0.5
    num_held_out: int = 256
    held_out_samples: int = 4
    model_size: ModelSize = ModelSize(hidden_size=96, num_layers=2)
    num_pretraining: int = 30_000
    pretraining_steps: int = 500
    pretraining_batch: int = 64
    pretraining_learning_rate: float = 3e-3
    num_preference: int = 4_000
    samples_per_prompt: int = 6
    batch_size: int = 32
    beta: float = 1.0
    warmup_steps: int = 5
    learning_rate: float = 7e-5
    lora_learning_rate: float = 3e-4
    lora_rank: int = 16
    sync_alpha: float = 0.6
    sync_steps: int = 32

    @property
    def max_new_tokens(self) -> int:
        """Enough for the longest right answer, its end token, and a few more."""
        return max(self.word_lengths) + 3


FULL = DemoSettings()

# A smoke test that takes seconds; what the model learns does not matter.
QUICK = DemoSettings(
    word_lengths=(3,),
    right_share=0.8,
    num_held_out=48,
    held_out_samples=2,
    model_size=ModelSize(hidden_size=64, num_layers=1),
    num_pretraining=1_000,
    pretraining_steps=200,
    pretraining_batch=32,
    pretraining_learning_rate=8e-3,
    num_preference=64,
    batch_size=8,
    warmup_steps=1,
    learning_rate=1e-3,
    lora_learning_rate=4e-3,
    sync_steps=2,
)
