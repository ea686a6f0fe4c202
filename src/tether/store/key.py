"""The key of a scored response: a hash of everything that was fed to the model.

Knows token ids and further model inputs; must not know weights, options, files or the order of rows.
"""

import struct
import sys
from array import array
from collections.abc import Mapping, Sequence
from hashlib import blake2b

import numpy as np

from tether.errors import StoreError

KEY_BYTES = 16
_AT_LENGTH = b"tether length v1"
_ENCODING = b"tether key v1"  # raise when the encoding below changes: old records are then never found


def content_key(
    prompt_ids: Sequence[int] | np.ndarray,
    response_ids: Sequence[int] | np.ndarray,
    *,
    inputs: Mapping[str, bytes | np.ndarray] | None = None,
) -> bytes:
    """The 128-bit key of one response to one prompt: equal exactly when the model was fed the same.

    Both lengths are hashed before the ids, so `([1, 2], [3])` and `([1], [2, 3])` differ. Ids count by value:
    a list, an int32 and an int64 array of the same ids give the same key.

    Args:
        prompt_ids: Token ids of the prompt, shape (num_prompt_tokens,).
        response_ids: Token ids of the response, shape (num_response_tokens,).
        inputs: Every further model input that changes the result (token types, image content, grids), by name, in any
            order. Integer arrays count by value, others by type and content.

    Returns:
        16 bytes.

    Raises:
        StoreError: If the ids are not integers in one dimension, or an input has no canonical bytes.

    Example:
        >>> content_key([1, 2], [3]).hex()
        '6391ceab4c9bbb6fca283363a3d31939'
    """
    prompt, response = _encode_ids(prompt_ids, "prompt_ids"), _encode_ids(response_ids, "response_ids")
    state = blake2b(struct.pack("<qq", len(prompt), len(response)), digest_size=KEY_BYTES, person=_ENCODING)
    state.update(prompt)
    state.update(response)
    for name in sorted(inputs or ()):
        assert inputs is not None
        encoded_name, (kind, content) = name.encode(), _encode_input(name, inputs[name])
        state.update(struct.pack("<qqq", len(encoded_name), len(kind), len(content)))
        state.update(encoded_name + kind)
        state.update(content)
    return state.digest()


def key_at_length(key: bytes, num_tokens: int) -> bytes:
    """The key of a response whose log-probs depend on the fed length, because its rotary embeddings do.

    A record under it is not the start of a record at another length, and is never served for one.

    Args:
        key: Its `content_key`.
        num_tokens: Tokens of prompt and response as fed.

    Returns:
        16 bytes.
    """
    return blake2b(key + struct.pack("<q", num_tokens), digest_size=KEY_BYTES, person=_AT_LENGTH).digest()


def _encode_ids(ids: Sequence[int] | np.ndarray, argument: str) -> bytes:
    """The ids as int64, little-endian."""
    if isinstance(ids, np.ndarray):
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise _not_ids(argument, f"an array of {ids.dtype} with shape {ids.shape}")
        return ids.astype("<i8", copy=False).tobytes()
    try:
        words = array("q", ids)
    except (TypeError, OverflowError) as error:
        raise _not_ids(argument, f"of type {type(ids).__name__} ({error})") from error
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()


def _not_ids(argument: str, found: str) -> StoreError:
    return StoreError(
        problem=f"Cannot make a content key from `{argument}`: it must be token ids (integers in one dimension), and "
        f"is {found}.",
        instead=f"Pass `{argument}` as a list of int, or as an integer array of shape (num_tokens,).",
    )


def _encode_input(name: str, value: bytes | np.ndarray) -> tuple[bytes, bytes]:
    """The kind of an input (with type and shape), and its content in a fixed byte order."""
    if isinstance(value, bytes):
        return b"bytes", value
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        integer = value.dtype.kind in "iu"
        canonical = value.astype("<i8" if integer else value.dtype.newbyteorder("<"), copy=False)
        shape = struct.pack(f"<{value.ndim}q", *value.shape)
        return b"array " + canonical.dtype.str.encode() + shape, canonical.tobytes()
    raise StoreError(
        problem=f"Cannot make a content key from the model input `{name}` of type {type(value).__name__}: only bytes "
        "and numeric arrays have the same bytes in every process.",
        instead=f"Pass `{name}` as a numeric numpy array, or as a digest of its content in bytes.",
    )
