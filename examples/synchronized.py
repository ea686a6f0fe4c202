"""The synchronized reference (TR-DPO, arXiv 2404.09656): every few steps it moves part of the way to the policy.

python examples/synchronized.py
"""

from toy import toy_model, toy_pairs, toy_tokenizer

from tether import DPOConfig, DPOTrainer, SynchronizedReference


def main(max_steps: int = 40, output_dir: str = "out/synchronized") -> None:
    args = DPOConfig(
        output_dir,
        sync_ref_model=True,
        ref_model_mixup_alpha=0.6,  # the policy's weight in each sync; 1 replaces the reference
        ref_model_sync_steps=2,  # optimizer steps between syncs
        max_steps=max_steps,
        learning_rate=1e-3,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = DPOTrainer(toy_model(), args=args, train_dataset=toy_pairs(64), processing_class=toy_tokenizer())
    trainer.train()
    trainer.save_model()
    assert isinstance(trainer.reference, SynchronizedReference)
    trainer.export_reference(f"{output_dir}/reference")  # as it is now: a model to load like any other
    print(f"the reference moved {trainer.reference.num_syncs} times")


if __name__ == "__main__":
    main()
