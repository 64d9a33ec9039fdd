"""Where a series moved: change points of a metric over sessions. Pure: numbers in, positions out.

Exact metrics change where their value changes. Noisy ones are divided as E-divisive does (Matteson and James 2014): the best
split of the whole, tested by permutation, then the best split of each half, until no split is significant. The statistic is
the between-group sum of squares of mid-ranks (the normalised form of Pettitt 1979), so that a spike moves it as little as any
other largest value, and no scale of the noise is assumed. If nothing ever moved, the first test alone decides: the chance
that any change point is told is `alpha`, whatever the noise, as long as sessions are exchangeable.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import msgspec

__all__ = ["ALPHA", "ChangePoint", "exact_changes", "least_points", "noisy_changes"]

ALPHA = 0.05
"""Chance of telling any change in a noisy metric that did not move."""
_LEAST_SEGMENT = 2
"""One value alone is a spike, not a level."""
_PERMUTATIONS = 1999
_SEED = 20140


class ChangePoint(msgspec.Struct, frozen=True, kw_only=True):
    """The series moved before the point `index`: there the new level begins."""

    index: int
    before: float
    """The level before: the value, or the median of the segment."""
    after: float
    p: float | None = None
    """Chance of so clear a split in a segment that did not move; None for an exact metric."""


def least_points(alpha: float = ALPHA) -> int:
    """How many points a noisy series needs before any order of them is rarer than `alpha`: eight for 5 %.

    A clean step in the middle of n distinct values is one of binomial(n, n/2) divisions, and counts in both directions.
    """
    return next(n for n in itertools.count(2 * _LEAST_SEGMENT) if 2 / math.comb(n, n // 2) <= alpha)


def exact_changes(values: Sequence[float]) -> tuple[ChangePoint, ...]:
    """Every place where the value is another than before."""
    pairs = enumerate(itertools.pairwise(values), start=1)
    return tuple(ChangePoint(index=index, before=old, after=new) for index, (old, new) in pairs if old != new)


def noisy_changes(values: Sequence[float], alpha: float = ALPHA) -> tuple[ChangePoint, ...]:
    """The significant divisions of a noisy series, in order; none where there are fewer than `least_points`.

    The same series gives the same answer: permutations are drawn from a fixed seed.
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
    levels = [_median(values[begin:end]) for begin, end in itertools.pairwise(edges) if begin < end]
    return tuple(
        ChangePoint(index=cut, before=levels[number], after=levels[number + 1], p=cuts[cut])
        for number, cut in enumerate(sorted(cuts))
    )


def _division(values: Sequence[float], alpha: float) -> tuple[int, float] | None:
    """The best split of a segment and its p-value, if it is significant."""
    if len(values) < least_points(alpha):
        return None
    ranks = _mid_ranks(values)
    best, cut = _best_split(ranks)
    if best <= 0:
        return None
    # A sum of squares is a float: what differs by rounding alone is equal.
    p = _chance(ranks, best * (1 - 1e-9), alpha)
    return None if p is None else (cut, p)


def _chance(ranks: Sequence[float], reached: float, alpha: float) -> float | None:
    """The share of orders whose best split is as clear, of orders drawn at random and the one seen; None beyond `alpha`."""
    generator, order, hits = random.Random(_SEED), list(ranks), 1
    for _ in range(_PERMUTATIONS):
        generator.shuffle(order)
        hits += _best_split(order)[0] >= reached
        if hits > alpha * (1 + _PERMUTATIONS):
            return None  # whatever the rest would give
    return hits / (1 + _PERMUTATIONS)


def _best_split(ranks: Sequence[float]) -> tuple[float, int]:
    """The largest between-group sum of squares over all splits, and where it lies. Ranks must sum to zero."""
    best, cut, total, n = -1.0, 0, 0.0, len(ranks)
    for index, rank in enumerate(ranks, start=1):
        total += rank
        if _LEAST_SEGMENT <= index <= n - _LEAST_SEGMENT:
            between = total * total * n / (index * (n - index))
            if between > best:
                best, cut = between, index
    return best, cut


def _mid_ranks(values: Sequence[float]) -> list[float]:
    """Ranks from their mean on, equal values sharing theirs: [3, 1, 1] gives [1, -0.5, -0.5]."""
    ordered = sorted(values)
    first: dict[float, int] = {}
    for index, value in enumerate(ordered):
        first.setdefault(value, index)
    many = {value: ordered.count(value) for value in first}
    middle = (len(values) - 1) / 2
    return [first[value] + (many[value] - 1) / 2 - middle for value in values]


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
