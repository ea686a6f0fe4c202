"""One record: the log-probs of one response as bytes, and the checksum that verifies them.

Knows bytes and arrays; must not know SQLite or files.
"""

from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tether.errors import StoreError
from tether.store.key import KEY_BYTES

LogProbs = npt.NDArray[np.float32]
_ON_DISK = np.dtype("<f4")
CHECKSUM_BYTES = 8
_ROUNDING = 1e-3  # nats by which the log-prob of a sure token may come out above 0, from logits of some hundreds
_ENCODING = b"tether record v1"


class Record(NamedTuple):
    """One row of the table `records`, as stored."""

    key: bytes
    num_tokens: int
    checksum: bytes
    log_probs: bytes


class RecordCodec:
    """Packs and verifies the records of one identity.

    The checksum covers identity, key and values, so that neither a flipped bit nor a row found through a corrupt index
    can be served.

    Args:
        identity: Digest of the reference whose log-probs these are.
    """

    def __init__(self, identity: str) -> None:
        self._start = blake2b(digest_size=CHECKSUM_BYTES, person=_ENCODING)
        self._start.update(identity.encode() + b"\0")

    def pack(self, key: bytes, log_probs: LogProbs) -> Record:
        """The record of `log_probs`, shape (num_tokens,), in nats."""
        blob = log_probs.astype(_ON_DISK, copy=False).tobytes()
        return Record(key, len(log_probs), self._checksum(key, blob), blob)

    def is_intact(self, record: tuple[object, object, object, object]) -> bool:
        """Whether a record read from disk is bit for bit what was packed."""
        key, num_tokens, checksum, blob = record
        if not isinstance(key, bytes) or not isinstance(blob, bytes) or not isinstance(num_tokens, int):
            return False
        return len(blob) == num_tokens * _ON_DISK.itemsize and checksum == self._checksum(key, blob)

    def _checksum(self, key: bytes, blob: bytes) -> bytes:
        state = self._start.copy()
        state.update(key)
        state.update(blob)
        return state.digest()


def unpack(record: Record, length: int | None = None) -> LogProbs:
    """The first `length` log-probs of an intact record (all of them by default), as a fresh float32 array."""
    num_tokens = record.num_tokens if length is None else length
    return np.frombuffer(record.log_probs, dtype=_ON_DISK, count=num_tokens).astype(np.float32)


def check_keys(keys: Sequence[bytes], others: Sequence[object], name: str) -> None:
    """Raises StoreError unless every key has 16 bytes and `others` has one entry per key."""
    if len(keys) != len(others):
        raise StoreError(
            problem=f"Cannot use {len(keys)} keys with {len(others)} {name}: each key needs exactly one entry.",
            instead=f"Pass one entry of `{name}` for each of `keys`.",
        )
    for position, key in enumerate(keys):
        if not isinstance(key, bytes) or len(key) != KEY_BYTES:
            raise StoreError(
                problem=f"Cannot use {key!r} as key {position}: a key is {KEY_BYTES} bytes.",
                instead="Make keys with `tether.store.content_key`.",
            )


def check_values(value: npt.ArrayLike, key: bytes, position: int) -> LogProbs:
    """`value` as float32, shape (num_tokens,); raises StoreError, naming the key, unless 1-D, finite and not above 0
    by more than rounding.
    """
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf, which is refused below
        log_probs = np.asarray(value, dtype=np.float32)
    name = f"the log-probs of key {key.hex()} (entry {position} of this call)"
    if log_probs.ndim != 1:
        raise StoreError(
            problem=f"Cannot store {name} with shape {log_probs.shape}: a record holds one number per response token.",
            instead="Pass an array of shape (num_response_tokens,).",
        )
    finite = np.isfinite(log_probs)
    if not finite.all():
        token = int(np.argmin(finite))
        raise StoreError(
            problem=f"Cannot store {name}: token {token} of {len(log_probs)} is {log_probs[token]}, which would spoil "
            "every run that reads it.",
            details="Nothing of this call was written.",
            instead="Find what makes the reference overflow on this row (its dtype, or a ruled-out token), or leave "
            "the row out.",
        )
    if (log_probs > _ROUNDING).any():
        token = int(np.argmax(log_probs))
        raise StoreError(
            problem=f"Cannot store {name}: token {token} of {len(log_probs)} is {log_probs[token]:.3g}, and no "
            "log-prob is above 0.",
            details="Nothing of this call was written.",
            instead="Store the logarithms of probabilities, in nats.",
        )
    return log_probs
