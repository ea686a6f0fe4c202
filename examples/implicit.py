"""The implicit reference: the policy trains an adapter, so its base with the adapter off is the reference. No copy.

python examples/implicit.py
"""

from peft import LoraConfig
from toy import toy_model, toy_pairs, toy_tokenizer

from tether import DPOConfig, DPOTrainer


def main(max_steps: int = 40, output_dir: str = "out/implicit") -> None:
    args = DPOConfig(output_dir, max_steps=max_steps, learning_rate=3e-3, save_strategy="no", disable_tqdm=True)
    trainer = DPOTrainer(
        toy_model(),
        args=args,
        train_dataset=toy_pairs(64),
        eval_dataset=toy_pairs(32, seed=1),
        processing_class=toy_tokenizer(),
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model()  # the adapter alone
    print(f"held-out rewards/margins: {trainer.evaluate()['eval_rewards/margins']:+.4f}")
    print(f"the reference holds {trainer.reference.extra_bytes} bytes beside the policy")
    question = toy_tokenizer()("1 + 2 =", return_tensors="pt")
    guess = trainer.model(**question).logits[0, -1].argmax()
    with trainer.null_ref_context():  # in here, a plain call of the policy answers as the reference
        before = trainer.model(**question).logits[0, -1].argmax()
    print(f"1 + 2 = {toy_tokenizer().decode(guess)}, says the policy; {toy_tokenizer().decode(before)}, its reference")


if __name__ == "__main__":
    main()
