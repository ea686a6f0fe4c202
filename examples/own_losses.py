"""Three losses of your own: tokens weighted, pairs weighted by a column of the rows, and a KL term.

python examples/own_losses.py
"""

import random

from torch import Tensor
from torch.nn.functional import logsigmoid
from toy import toy_model, toy_pairs, toy_tokenizer

from tether import DPOConfig, DPOTrainer, LossOptions, PairScores, TokenScores


def token_weighted(scores: PairScores, options: LossOptions) -> Tensor:
    """DPO on log-ratios in which a token counts the more, the less the reference expected it."""

    def worth(response: TokenScores) -> Tensor:
        return response.sums((1 - response.reference.exp()) * response.logratios)

    return -logsigmoid(options.beta * (worth(scores.tokens.chosen) - worth(scores.tokens.rejected)))


def confidence_weighted(scores: PairScores, options: LossOptions) -> Tensor:
    """DPO in which a pair counts as much as its label can be trusted: a column of the rows."""
    return scores.columns["confidence"] * -logsigmoid(options.beta * scores.delta)


def with_kl_term(scores: PairScores, options: LossOptions) -> Tensor:
    """DPO, and an estimate of the KL divergence from the reference on the chosen response, in nats per token."""
    chosen = scores.tokens.chosen
    ratios = -chosen.logratios
    divergence = chosen.sums(ratios.exp() - 1 - ratios) / scores.chosen_lengths
    return -logsigmoid(options.beta * scores.delta) + 0.1 * divergence


token_weighted.needs_tokens = with_kl_term.needs_tokens = True


def main(max_steps: int = 40, output_dir: str = "out/own_losses") -> None:
    draw = random.Random(0)
    rows = [{**row, "confidence": draw.random()} for row in toy_pairs(64)]
    for loss in (token_weighted, confidence_weighted, with_kl_term):
        columns = ["confidence"] if loss is confidence_weighted else None
        options = {"save_strategy": "no", "disable_tqdm": True, "loss_columns": columns}
        trainer = DPOTrainer(
            toy_model(),
            args=DPOConfig(output_dir, max_steps=max_steps, learning_rate=1e-3, **options),
            train_dataset=rows,
            processing_class=toy_tokenizer(),
            loss=loss,
        )
        print(f"{loss.__name__}: {trainer.train().training_loss:.4f}")


if __name__ == "__main__":
    main()
