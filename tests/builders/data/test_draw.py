"""Seeded ids and orders, equal in every process whatever its PYTHONHASHSEED."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_core.builders.data.rows import FIRST_FREE_ID, IdSource, shuffled
from hpc_core.case.errors import DataError, MissingLibraryError


def test_ids_of_a_seed_stay_the_same_for_good() -> None:
    """Seed 0 draws the same ids forever; a change here voids every baseline."""
    assert IdSource(0, 1000).row(6) == [851, 638, 512, 271, 309, 43]


def test_order_of_a_seed_stays_the_same_for_good() -> None:
    """Seed 0 shuffles ten items the same way forever."""
    assert shuffled(list(range(10)), 0) == [9, 1, 3, 8, 7, 6, 0, 4, 2, 5]


@given(seed=st.integers(0, 2**40), vocab_size=st.integers(4, 200_000), length=st.integers(0, 200))
def test_ids_are_never_special_and_lie_in_the_vocabulary(seed: int, vocab_size: int, length: int) -> None:
    """Ids lie in [3, vocab_size), and as many are drawn as requested."""
    ids = IdSource(seed, vocab_size).row(length)
    assert len(ids) == length
    assert all(FIRST_FREE_ID <= token < vocab_size for token in ids)


@given(items=st.lists(st.integers()), seed=st.integers(0, 2**40))
def test_shuffling_keeps_every_item(items: list[int], seed: int) -> None:
    """A shuffled list holds the same items, and the given list is not changed."""
    before = list(items)
    assert sorted(shuffled(items, seed)) == sorted(items)
    assert items == before


def test_different_seeds_give_different_ids_and_orders() -> None:
    """Seeds 1 and 2 give different ids and orders."""
    assert IdSource(1, 32000).row(20) != IdSource(2, 32000).row(20)
    assert shuffled(list(range(50)), 1) != shuffled(list(range(50)), 2)


def test_a_vocabulary_of_special_ids_is_refused() -> None:
    """A vocabulary of three ids is refused with the number needed."""
    with pytest.raises(DataError, match=r"vocabulary of 3 ids.*at least 4"):
        IdSource(0, 3)


def test_a_negative_seed_is_refused() -> None:
    """A negative seed is refused with its value."""
    with pytest.raises(DataError, match="0 or above, got -5"):
        shuffled([1, 2], -5)


def test_without_numpy_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without numpy the error names the pip command."""
    monkeypatch.setitem(sys.modules, "numpy.random", None)
    with pytest.raises(MissingLibraryError, match=r"numpy.*pip install 'hpc-core\[run\]'"):
        IdSource(0, 1000)
