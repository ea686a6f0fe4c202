"""A vision-language model on pairs with images, its reference scored once and kept on disk.

python examples/vision.py
"""

from toy_vision import toy_image_pairs, toy_processor, toy_vision_model

from tether import DPOConfig, DPOTrainer


def main(max_steps: int = 40, output_dir: str = "out/vision") -> None:
    args = DPOConfig(
        output_dir,
        max_steps=max_steps,
        max_length=None,  # images are many tokens
        precompute_ref_log_probs=True,
        learning_rate=1e-3,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        toy_vision_model(),  # or a path: "llava-hf/llava-1.5-7b-hf", and no `processing_class`
        args=args,
        train_dataset=toy_image_pairs(64),
        eval_dataset=toy_image_pairs(32, seed=1),
        processing_class=toy_processor(),
    )
    trainer.train()
    print(f"held-out rewards/accuracies: {trainer.evaluate()['eval_rewards/accuracies']:.2f}")


if __name__ == "__main__":
    main()
