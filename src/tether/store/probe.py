"""A reference's answers to texts that are no rows of a run, by which one that answers otherwise is told from it.

Knows ids and arrays; knows no model and no tolerance.
"""

import json
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, NamedTuple, Self

import numpy as np

from tether.store.key import KEY_BYTES
from tether.store.record import LogProbs, Record, RecordCodec, unpack

Text = tuple[tuple[int, ...], tuple[int, ...]]


class KeptProbe(NamedTuple):
    """Texts, what a reference answered, and what it ran on.

    Attributes:
        texts: Token ids of prompt and response of each.
        log_probs: Of the responses' tokens, one text after the other, float32 in nats.
        made_with: Versions and device, by name, for people.
        noise: How far rounding moves such answers there, by name; None if it hardly does.
    """

    texts: tuple[Text, ...]
    log_probs: LogProbs
    made_with: Mapping[str, str]
    noise: Mapping[str, float] | None = None

    @property
    def length(self) -> int:
        """Tokens of the longest text."""
        return max(len(prompt) + len(response) for prompt, response in self.texts)

    def as_fields(self) -> dict[str, Any]:
        """All of it as JSON can hold it; float32 as decimal text comes back bit for bit."""
        return self._asdict() | {"log_probs": self.log_probs.tolist()}

    @classmethod
    def of_fields(cls, fields: Mapping[str, Any]) -> Self:
        """The probe of what `as_fields` returned."""
        texts = tuple((tuple(prompt), tuple(response)) for prompt, response in fields["texts"])
        return cls(texts, np.asarray(fields["log_probs"], dtype=np.float32), fields["made_with"], fields["noise"])

    def pack(self, codec: RecordCodec) -> tuple[str, bytes, bytes]:
        """What stands in the table `probes`: `about`, `checksum`, `log_probs`."""
        about = json.dumps({"texts": self.texts, "made_with": dict(self.made_with), "noise": self.noise})
        record = codec.pack(_key(about), self.log_probs)
        return about, record.checksum, record.log_probs

    @classmethod
    def unpack(cls, codec: RecordCodec, about: str, checksum: bytes, log_probs: bytes) -> Self | None:
        """The probe of a row of that table; None if it is damaged."""
        record = Record(_key(str(about)), len(log_probs) // 4, checksum, log_probs)
        return cls.of_fields(json.loads(about) | {"log_probs": unpack(record)}) if codec.is_intact(record) else None


def _key(about: str) -> bytes:
    return blake2b(about.encode(), digest_size=KEY_BYTES).digest()
