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
import random
import statistics
from collections.abc import Sequence

import msgspec

ALPHA = 0.05
"""Probability of a change point in a noisy metric that did not move."""
_LEAST_SEGMENT = 2
"""One value alone is a spike, not a new level."""
_PERMUTATIONS = 1999
_SEED = 20140


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
    ranks = _centred_ranks(values)
    best, cut = _best_split(ranks)
    if best <= 0:
        return None
    # Sums of squares that differ only by rounding are equal.
    p = _p_value(ranks, best * (1 - 1e-9), alpha)
    return None if p is None else (cut, p)


def _p_value(ranks: Sequence[float], reached: float, alpha: float) -> float | None:
    """Return the share of orders whose best split is as clear, of random orders and the observed one; None above `alpha`."""
    generator, order, hits = random.Random(_SEED), list(ranks), 1
    for _ in range(_PERMUTATIONS):
        generator.shuffle(order)
        hits += _best_split(order)[0] >= reached
        if hits > alpha * (1 + _PERMUTATIONS):
            return None  # whatever the remaining orders give
    return hits / (1 + _PERMUTATIONS)


def _best_split(ranks: Sequence[float]) -> tuple[float, int]:
    """Return the largest between-group sum of squares over all splits, and its position. Ranks must sum to zero."""
    best, cut, total, n = -1.0, 0, 0.0, len(ranks)
    for index, rank in enumerate(ranks, start=1):
        total += rank
        if _LEAST_SEGMENT <= index <= n - _LEAST_SEGMENT:
            between = total * total * n / (index * (n - index))
            if between > best:
                best, cut = between, index
    return best, cut


def _centred_ranks(values: Sequence[float]) -> list[float]:
    """Return ranks less their mean; equal values share theirs: [3, 1, 1] gives [1, -0.5, -0.5]."""
    from scipy.stats import rankdata  # takes a second to import, and most reports have no noisy series

    middle = (len(values) + 1) / 2
    return [float(rank) - middle for rank in rankdata(values)]
