"""Seeded random numbers: the token ids of a row and the order of an epoch.

Knows numpy's PCG64 and nothing of data sets. The same seed gives the same numbers on every machine, whatever
PYTHONHASHSEED says. numpy is imported on first use, so that reading texts needs the standard library alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from hpc_core.case.errors import DataError, MissingLibraryError

if TYPE_CHECKING:
    from numpy.random import Generator

__all__ = ["FIRST_FREE_ID", "IdSource", "shuffled"]

FIRST_FREE_ID = 3
"""Ids 0, 1 and 2 are padding, BOS and EOS; random and byte-level ids start here."""

_SHUFFLE_STREAM = 1
"""Mixed into the seed of shuffling, so that rows are not ordered by the numbers that their ids were drawn from."""

_T = TypeVar("_T")


def _generator(entropy: list[int]) -> Generator:
    if entropy[0] < 0:
        raise DataError(f"A data seed must be 0 or above, got {entropy[0]}: say DataSpec(seed={-entropy[0]}).")
    try:
        from numpy.random import PCG64, Generator, SeedSequence
    except ImportError as error:
        raise MissingLibraryError(
            "Random token ids and shuffling need numpy, which is not installed: pip install 'hpc-core[run]'."
        ) from error
    # A one-element list is the same entropy as the plain integer: PCG64(seed).
    return Generator(PCG64(SeedSequence(entropy)))


class IdSource:
    """Draws token ids from [3, vocab_size), one row after another, so that fewer rows are a prefix of more rows."""

    def __init__(self, seed: int, vocab_size: int) -> None:
        """Start the stream of this seed.

        Raises:
            DataError: the vocabulary has no id outside the special ones, or the seed is negative.
            MissingLibraryError: numpy is absent.
        """
        if vocab_size <= FIRST_FREE_ID:
            raise DataError(
                f"A vocabulary of {vocab_size} ids has none to draw: ids 0 to {FIRST_FREE_ID - 1} are special. "
                f"Use a model with vocab_size of at least {FIRST_FREE_ID + 1}."
            )
        self._vocab_size = vocab_size
        self._numbers = _generator([seed])

    def row(self, length: int) -> list[int]:
        """The next `length` token ids."""
        ids: list[int] = self._numbers.integers(FIRST_FREE_ID, self._vocab_size, size=length).tolist()
        return ids


def shuffled(items: list[_T], seed: int) -> list[_T]:
    """A new list with the same items in the order that this seed gives.

    Raises:
        DataError: the seed is negative.
        MissingLibraryError: numpy is absent.
    """
    order: list[int] = _generator([seed, _SHUFFLE_STREAM]).permutation(len(items)).tolist()
    return [items[index] for index in order]
