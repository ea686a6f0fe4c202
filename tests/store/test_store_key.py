"""The content key: equal exactly when the model is fed the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tether.errors import StoreError
from tether.store import content_key

ids = st.lists(st.integers(0, 200_000), max_size=6)


def test_store_key_tells_where_the_prompt_ends() -> None:
    keys = {content_key([1, 2], [3]), content_key([1], [2, 3]), content_key([], [1, 2, 3])}
    assert len(keys) == 3


@given(ids, ids, ids, ids)
def test_store_key_is_equal_exactly_for_equal_ids(
    prompt: list[int], response: list[int], other_prompt: list[int], other_response: list[int]
) -> None:
    is_same = (prompt, response) == (other_prompt, other_response)
    assert (content_key(prompt, response) == content_key(other_prompt, other_response)) == is_same


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64, np.uint32, ">i4", ">i8"])
def test_store_key_counts_ids_by_value(dtype: object) -> None:
    as_array = content_key(np.array([1, 2, 3], dtype), np.array([4, 5], dtype))
    assert as_array == content_key([1, 2, 3], [4, 5]) == content_key(range(1, 4), (4, 5))


def test_store_key_of_a_strided_array_is_that_of_its_values() -> None:
    assert content_key(np.arange(10)[::2], np.arange(3)[::-1]) == content_key([0, 2, 4, 6, 8], [2, 1, 0])


def test_store_key_is_the_same_in_every_version_on_every_machine() -> None:
    # Changing these throws away every store in the world: only together with the version tag in key.py.
    assert content_key([1, 2], [3]).hex() == "6391ceab4c9bbb6fca283363a3d31939"
    inputs = {"token_type_ids": np.array([0, 1, 1]), "image": b"digest", "grid": np.array([[1, 2, 2]])}
    assert content_key([1, 2], [3], inputs=inputs).hex() == "c89e827fdbf093ff5250066068efd643"


def test_store_key_changes_with_every_further_input() -> None:
    grid = np.array([[1, 4, 6]])
    variants = [
        None,
        {"grid": grid},
        {"grid": grid.T},
        {"grid": grid + 1},
        {"other": grid},
        {"grid": grid.astype(np.float32)},
        {"grid": grid.astype("<i8").tobytes()},
        {"grid": grid, "image": b""},
        {"grid": grid, "image": b"x"},
        {"image": b"x", "gri": b"dx"},
    ]
    assert len({content_key([1], [2], inputs=inputs) for inputs in variants}) == len(variants)


def test_store_key_ignores_the_order_of_further_inputs() -> None:
    one, two = {"a": b"1", "b": np.array([2])}, {"b": np.array([2], np.int32), "a": b"1"}
    assert content_key([1], [2], inputs=one) == content_key([1], [2], inputs=two)
    assert content_key([1], [2], inputs={}) == content_key([1], [2])


@given(st.lists(st.tuples(st.text(max_size=3), st.binary(max_size=3)), max_size=3, unique_by=lambda x: x[0]))
def test_store_key_does_not_mix_names_with_contents(items: list[tuple[str, bytes]]) -> None:
    joined = {"".join(name for name, _ in items): b"".join(content for _, content in items)}
    is_same = dict(items) == joined
    assert (content_key([1], [2], inputs=dict(items)) == content_key([1], [2], inputs=joined)) == is_same


@pytest.mark.parametrize("bad", [[1.5], np.array([1.0]), np.array([[1, 2]]), [None], [2**64], "text"])
def test_store_key_refuses_what_are_no_ids(bad: object) -> None:
    with pytest.raises(StoreError, match="prompt_ids"):
        content_key(bad, [1])  # type: ignore[arg-type]


def test_store_key_refuses_inputs_without_canonical_bytes() -> None:
    with pytest.raises(StoreError, match="pixel"):
        content_key([1], [2], inputs={"pixel": [1, 2]})  # type: ignore[dict-item]
    with pytest.raises(StoreError, match="pixel"):
        content_key([1], [2], inputs={"pixel": np.array([object()])})
