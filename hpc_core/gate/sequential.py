"""The sequential three-way rule of an A/B: look at the pairs so far, stop when it is decided. Pure; starts nothing.

There is a look whenever the pairs have grown by a third, so that many pairs cost few looks. Each is judged at `alpha` divided by the number of looks that are allowed, so that the whole stays within `alpha` whatever the
looks have in common (union bound). A quarter, as in reference/gating.md 4.5, is calibrated for 5 %: simulated, it gives
5.3 % there, and 1.5 times what is stated at 0.1 %. The passing side is only ever judged at 5 %, where a fifth a look keeps it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from hpc_core.gate.distance import Distance, paired_distance
from hpc_core.gate.interval import PASS_ALPHA, Interval, interval_of, three_way
from hpc_core.gate.spread import Spread
from hpc_core.gate.verdict import Verdict
from hpc_core.record.record import Better

__all__ = ["Look", "Sequential"]

_PASS_LOOKS = 5
_MOST_PAIRS = 100


class Look(msgspec.Struct, frozen=True, kw_only=True):
    """What one look at the pairs so far says."""

    verdict: Verdict | None
    """None while undecided and more pairs are allowed."""
    interval: Interval | None
    """None before the first look."""
    alpha_spent: float
    """At most so likely was a false REGRESSED at this look or an earlier one."""
    settles: str = ""
    """At the cap, a sentence: what would settle it."""


class Sequential(msgspec.Struct, frozen=True):
    """The rule; `look` is called with all pairs so far, after each pair. Between looks it decides nothing.

    Args:
        alpha: of a false REGRESSED, over all looks together.
        tolerance: the allowed ratio, such as 0.005.
        least_pairs: pairs before the first look.
        most_pairs: pairs after which an undecided comparison is INCONCLUSIVE.
        better: direction of the metric.
        spread: of processes, where it is known; None lets the pairs alone say it, as for wall time.

    Raises:
        ValueError: alpha is not between 0 and 0.5, the tolerance below 0, or the numbers of pairs make no sense.
    """

    alpha: float
    tolerance: float
    least_pairs: int = 3
    most_pairs: int = 24
    better: Better = "lower"
    spread: Spread | None = None

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 0.5 or not 2 <= self.least_pairs <= self.most_pairs or self.tolerance < 0:
            raise ValueError(f"No rule: {self}.")

    @property
    def looks_at(self) -> tuple[int, ...]:
        """The numbers of pairs at which is looked: the least, then a third more each time, and the most."""
        found = [self.least_pairs]
        while found[-1] < self.most_pairs:
            found.append(min(self.most_pairs, math.ceil(found[-1] * 4 / 3)))
        return tuple(found)

    @property
    def looks(self) -> int:
        """Looks that are allowed."""
        return len(self.looks_at)

    def look(self, base: Sequence[float], head: Sequence[float]) -> Look:
        """Judge all pairs so far, one value a process, in seconds or anything else above 0.

        Raises:
            ValueError: sides of different length, or a value that is not above 0.
        """
        if len(base) < self.least_pairs and len(base) == len(head):
            return Look(verdict=None, interval=None, alpha_spent=0.0)
        distance = paired_distance(base, head, self.spread)
        interval = self._interval(distance)
        spent = self.alpha * sum(at <= distance.new for at in self.looks_at) / self.looks
        if distance.new < self.most_pairs and distance.new not in self.looks_at:
            return Look(verdict=None, interval=interval, alpha_spent=spent)
        verdict = three_way(interval, self.tolerance, self.better)
        if verdict is not Verdict.INCONCLUSIVE:
            return Look(verdict=verdict, interval=interval, alpha_spent=spent)
        if distance.new < self.most_pairs:
            return Look(verdict=None, interval=interval, alpha_spent=spent)
        return Look(verdict=verdict, interval=interval, alpha_spent=spent, settles=self._settles(distance))

    def _interval(self, distance: Distance) -> Interval:
        passing = PASS_ALPHA / min(_PASS_LOOKS, self.looks)
        return interval_of(distance, self.alpha / self.looks, pass_alpha=passing)

    def _settles(self, distance: Distance) -> str:
        run = distance.new
        for pairs in range(run + 1, _MOST_PAIRS + 1):
            grown = distance.grown(new=pairs - run)
            if three_way(self._interval(grown), self.tolerance, self.better) is not Verdict.INCONCLUSIVE:
                return f"About {pairs} pairs like these would settle it ({run} were run)."
        return f"More than {_MOST_PAIRS} pairs like these ({run} were run), a quieter machine, or another tolerance would settle it."
