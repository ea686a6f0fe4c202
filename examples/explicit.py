"""The explicit reference: a frozen copy of the policy, held beside it. It is what you get without any option.

python examples/explicit.py
"""

from toy import toy_model, toy_pairs, toy_tokenizer

from tether import DPOConfig, DPOTrainer


def main(max_steps: int = 40, output_dir: str = "out/explicit") -> None:
    args = DPOConfig(output_dir, max_steps=max_steps, learning_rate=1e-3, save_strategy="no", disable_tqdm=True)
    trainer = DPOTrainer(
        toy_model(),  # or a path or a name on the hub: the tokenizer beside it is then found too
        args=args,
        train_dataset=toy_pairs(64),  # or datasets.load_dataset("json", data_files="pairs.jsonl", split="train")
        eval_dataset=toy_pairs(32, seed=1),
        processing_class=toy_tokenizer(),
    )
    trainer.train()
    trainer.save_model()  # the policy and its tokenizer, to output_dir
    print(f"held-out rewards/margins: {trainer.evaluate()['eval_rewards/margins']:+.4f}")
    print(f"the reference holds {trainer.reference.extra_bytes:,} bytes and made {trainer.reference.num_passes} passes")


if __name__ == "__main__":
    main()
