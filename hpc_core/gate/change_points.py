"""Find where a series moved: change points of a metric over sessions.

An exact metric changes where its value changes. A noisy one is divided as E-divisive does (Matteson and James 2014): the best
split of the whole, tested by permutation, then the best split of each half, until no split is significant. The statistic is
the between-group sum of squares of mid-ranks (the normalised form of Pettitt 1979), so that a spike counts no more than any
other largest value, and no scale of the noise is assumed. If the series never moved, the first test alone decides: a change
point is reported with probability `alpha`, whatever the noise, as long as sessions are exchangeable.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]
    IntArray = NDArray[np.intp]

ALPHA = 0.05
"""Probability of a change point in a noisy metric that did not move."""
_LEAST_SEGMENT = 2
"""One value alone is a spike, not a new level."""
_PERMUTATIONS = 1999
_SEED = 20140
_AT_ONCE = 100
"""Orders in memory."""


class ChangePoint(msgspec.Struct, frozen=True, kw_only=True):
    """The series moved before the point `index`, where the new level begins."""

    index: int
    before: float
    """The level before: the value, or the median of the segment."""
    after: float
    p: float | None = None
    """Probability of so clear a split in a segment that did not move; None for an exact metric."""


def least_points(alpha: float = ALPHA) -> int:
    """Return how many points a noisy series needs before any order of them is rarer than `alpha`: eight for 5 %.

    A clean step in the middle of n distinct values is one of binomial(n, n/2) divisions, and counts in both directions.
    """
    return next(n for n in itertools.count(2 * _LEAST_SEGMENT) if 2 / math.comb(n, n // 2) <= alpha)


def exact_changes(values: Sequence[float]) -> tuple[ChangePoint, ...]:
    """Return every place where the value differs from the one before."""
    pairs = enumerate(itertools.pairwise(values), start=1)
    return tuple(ChangePoint(index=index, before=old, after=new) for index, (old, new) in pairs if old != new)


def noisy_changes(values: Sequence[float], alpha: float = ALPHA) -> tuple[ChangePoint, ...]:
    """Return the significant divisions of a noisy series, in order; none where there are fewer than `least_points`.

    The same series gives the same result: permutations are drawn from a fixed seed.
    """
    cuts: dict[int, float] = {}
    todo = [(0, len(values))]
    while todo:
        begin, end = todo.pop()
        found = _division(values[begin:end], alpha)
        if found is not None:
            cut = begin + found[0]
            cuts[cut] = found[1]
            todo += [(begin, cut), (cut, end)]
    edges = [0, *sorted(cuts), len(values)]
    levels = [statistics.median(values[begin:end]) for begin, end in itertools.pairwise(edges) if begin < end]
    return tuple(
        ChangePoint(index=cut, before=levels[number], after=levels[number + 1], p=cuts[cut])
        for number, cut in enumerate(sorted(cuts))
    )


def _division(values: Sequence[float], alpha: float) -> tuple[int, float] | None:
    """Return the best split of a segment and its p-value, if it is significant."""
    if len(values) < least_points(alpha):
        return None
    import numpy as np

    ranks = _centred_ranks(values)
    [reached], [cut] = _best_splits(ranks[np.newaxis])
    if reached <= 0:
        return None
    # Sums of squares that differ only by rounding are equal.
    p = _p_value(ranks, reached * (1 - 1e-9), alpha)
    return None if p is None else (int(cut), p)


def _p_value(ranks: FloatArray, reached: float, alpha: float) -> float | None:
    """Return the share of orders whose best split is as clear, of random orders and the observed one; None above `alpha`."""
    import numpy as np

    # RandomState, because its numbers are the same in every version of numpy.
    generator, hits = np.random.RandomState(_SEED), 1
    for first in range(0, _PERMUTATIONS, _AT_ONCE):
        rows = min(_AT_ONCE, _PERMUTATIONS - first)
        orders = generator.random_sample((rows, len(ranks))).argsort(axis=1)
        hits += int((_best_splits(ranks[orders])[0] >= reached).sum())
        if hits > alpha * (1 + _PERMUTATIONS):
            return None  # whatever the remaining orders give
    return hits / (1 + _PERMUTATIONS)


def _best_splits(rows: FloatArray) -> tuple[FloatArray, IntArray]:
    """Return for each row of ranks the largest between-group sum of squares over all splits, and its position.

    The ranks of a row must sum to zero.
    """
    import numpy as np

    n = rows.shape[1]
    at = np.arange(_LEAST_SEGMENT, n - _LEAST_SEGMENT + 1)
    between = rows.cumsum(axis=1)[:, _LEAST_SEGMENT - 1 : n - _LEAST_SEGMENT] ** 2 * (n / (at * (n - at)))
    return between.max(axis=1), at[between.argmax(axis=1)]


def _centred_ranks(values: Sequence[float]) -> FloatArray:
    """Return ranks less their mean; equal values share theirs: [3, 1, 1] gives [1, -0.5, -0.5]."""
    from scipy.stats import rankdata  # takes a second to import, and most reports have no noisy series

    ranks: FloatArray = rankdata(values) - (len(values) + 1) / 2
    return ranks
