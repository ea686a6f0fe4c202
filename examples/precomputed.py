"""The precomputed reference: every pair is scored once, the answers stay on disk, and later runs only read them.

python examples/precomputed.py
"""

from toy import toy_model, toy_pairs, toy_tokenizer

from tether import DPOConfig, DPOTrainer


def main(max_steps: int = 40, output_dir: str = "out/precomputed") -> None:
    for beta in (0.1, 0.5):  # another beta, learning rate, seed or order of rows needs no new answers
        args = DPOConfig(
            f"{output_dir}/beta-{beta}",
            beta=beta,
            precompute_ref_log_probs=True,
            ref_store=f"{output_dir}/store.sqlite",  # left out: one in your cache folder, for all runs
            max_steps=max_steps,
            learning_rate=1e-3,
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = DPOTrainer(toy_model(), args=args, train_dataset=toy_pairs(64), processing_class=toy_tokenizer())
        trainer.train()
        trainer.save_model()
        print(f"beta {beta}: {trainer.reference.num_passes} reference passes, {trainer.reference.extra_bytes} bytes")


if __name__ == "__main__":
    main()
