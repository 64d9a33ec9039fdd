"""After each pair of processes: is it decided? The sequential three-way rule (reference: docs/ab.md). Pure.

A quarter of alpha is spent at each look. That keeps both errors near alpha for looks at 3 to 12 pairs: calibrated by
simulation, no theorem. Stopping at the first significant look would quadruple the false alarms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from hpc_core.gate.interval import PASS_ALPHA, Interval, paired_interval, three_way
from hpc_core.gate.verdict import Verdict

__all__ = ["Look", "Sequential"]

_SHARE = 4
"""Looks that alpha is divided by."""


class Look(msgspec.Struct, frozen=True, kw_only=True):
    """What one look at the pairs so far says."""

    verdict: Verdict | None
    """None: undecided, and more pairs are allowed."""
    interval: Interval | None
    """None before there are pairs enough for one."""
    alpha_spent: float
    settles: str = ""
    """Of an INCONCLUSIVE one: what would settle it."""


class Sequential(msgspec.Struct, frozen=True):
    """Decides a metric that is better lower from pairs of processes, as soon as they allow it.

    Raises:
        ValueError: alpha is not between 0 and 0.5, or the numbers of pairs make no sense.
    """

    alpha: float
    tolerance: float
    """Ratio."""
    least_pairs: int = 3
    most_pairs: int = 12

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 0.5 or not 2 <= self.least_pairs <= self.most_pairs or self.tolerance < 0:
            raise ValueError(f"No rule: {self}.")

    def look(self, base: Sequence[float], head: Sequence[float]) -> Look:
        """Judge the pairs so far, one value a process, in seconds or anything else above 0."""
        pairs = len(base)
        if pairs < self.least_pairs:
            return Look(verdict=None, interval=None, alpha_spent=0.0)
        spent = self.alpha / _SHARE
        interval = paired_interval(base, head, spent, pass_alpha=PASS_ALPHA / _SHARE)
        verdict = three_way(interval, self.tolerance, "lower")
        if verdict is not Verdict.INCONCLUSIVE:
            return Look(verdict=verdict, interval=interval, alpha_spent=spent)
        undecided = None if pairs < self.most_pairs else verdict
        return Look(verdict=undecided, interval=interval, alpha_spent=spent, settles=self._settles(interval, pairs))

    def _settles(self, interval: Interval, pairs: int) -> str:
        middle = (interval.pass_low + interval.pass_high) / 2
        gap = abs(middle - self.tolerance)
        reach = interval.pass_high - middle if middle < self.tolerance else middle - interval.low
        if gap <= 0 or not math.isfinite(reach):
            return "The change lies at the tolerance itself: another tolerance would settle it."
        needed = math.ceil(pairs * (reach / gap) ** 2)
        if needed > 100:
            return f"More than 100 pairs like these ({pairs} were run), a quieter machine, or another tolerance would settle it."
        return f"About {max(needed, pairs + 1)} pairs like these would settle it ({pairs} were run)."
