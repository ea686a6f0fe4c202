"""A reference behind HTTP: a server scores the responses, each once, and the answers stay on disk.

python examples/http_reference.py http://localhost:8000
"""

import json
import sys
from urllib.request import Request, urlopen

import torch
from toy import toy_model, toy_pairs, toy_tokenizer

from tether import (
    DPOConfig,
    DPOTrainer,
    LogProbStore,
    PairBatch,
    PrecomputedReference,
    Reference,
    ReferenceIdentity,
    ResponseLogProbs,
)
from tether.types import offsets_of


class HTTPReference(Reference):
    """Sends `[[prompt ids, response ids], ...]` and receives the log-prob of each response token, in nats."""

    def __init__(self, url: str, name: str) -> None:
        self.url, self.name = url, name

    @property
    def identity(self) -> ReferenceIdentity:
        return ReferenceIdentity.named(self.name)  # stored answers are found by it: another model, another name

    def log_probs(self, batch: PairBatch) -> ResponseLogProbs:
        questions = json.dumps([[response.prompt_ids, response.token_ids] for response in batch.responses()])
        with urlopen(Request(self.url, questions.encode(), {"Content-Type": "application/json"})) as reply:
            values = [value for answer in json.load(reply) for value in answer]
        return ResponseLogProbs(
            torch.tensor(values, device=batch.device), offsets_of(batch.response_lengths, batch.device)
        )


def main(url: str, max_steps: int = 40, output_dir: str = "out/http_reference") -> None:
    store = LogProbStore(f"{output_dir}/store.sqlite")
    reference = PrecomputedReference(store, HTTPReference(url, "toy-model-v1"))
    trainer = DPOTrainer(
        toy_model(),
        reference=reference,
        args=DPOConfig(output_dir, max_steps=max_steps, learning_rate=1e-3, save_strategy="no", disable_tqdm=True),
        train_dataset=toy_pairs(64),
        processing_class=toy_tokenizer(),
    )
    trainer.train()
    print(f"the server scored {reference.num_computed} responses")


if __name__ == "__main__":
    main(sys.argv[1])
