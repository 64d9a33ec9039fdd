"""The sequential three-way rule of an A/B: look after each pair, stop when it is decided. Pure; starts nothing.

Each look is judged at `alpha` divided by the number of looks that are allowed, so that the whole stays within `alpha` whatever the
looks have in common (union bound). A quarter, as in reference/gating.md 4.5, is calibrated for 5 %: simulated, it gives
5.3 % there, and 1.5 times what is stated at 0.1 %. The passing side is only ever judged at 5 %, where a fifth a look keeps it.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from hpc_core.gate.distance import Distance, paired_distance
from hpc_core.gate.interval import PASS_ALPHA, Interval, interval_of, three_way
from hpc_core.gate.spread import Spread
from hpc_core.gate.verdict import Verdict
from hpc_core.record import Better

__all__ = ["Look", "Sequential"]

_PASS_LOOKS = 5
_MOST_MORE = 200


class Look(msgspec.Struct, frozen=True, kw_only=True):
    """What one look gave."""

    verdict: Verdict | None
    """None while undecided and more pairs are allowed."""
    interval: Interval
    alpha_spent: float
    """At most so likely was a false REGRESSED at this look or an earlier one."""
    settled_by: str = ""
    """At the cap, what would decide it."""


class Sequential(msgspec.Struct, frozen=True):
    """The rule; `look` is called with all pairs so far, after each pair from `least_pairs` on.

    Args:
        alpha: of a false REGRESSED, over all looks together.
        tolerance: the allowed ratio, such as 0.005.
        least_pairs: pairs before the first look.
        most_pairs: pairs after which an undecided comparison is INCONCLUSIVE.
        better: direction of the metric.
        spread: of processes, where it is known; None lets the pairs alone say it, as for wall time.
    """

    alpha: float
    tolerance: float
    least_pairs: int = 3
    most_pairs: int = 12
    better: Better = "lower"
    spread: Spread | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot decide.

        Raises:
            ValueError: fewer than 2 pairs, or fewer at most than at least.
        """
        if not 2 <= self.least_pairs <= self.most_pairs:
            raise ValueError(f"An A/B takes 2 pairs at least, got {self.least_pairs} to {self.most_pairs}.")

    @property
    def looks(self) -> int:
        """Looks that are allowed."""
        return self.most_pairs - self.least_pairs + 1

    def look(self, base: Sequence[float], head: Sequence[float]) -> Look:
        """Judge all pairs so far.

        Raises:
            ValueError: no pair, sides of different length, or a value that is not above 0.
        """
        distance = paired_distance(base, head, self.spread)
        interval = self._interval(distance)
        taken = distance.new - self.least_pairs + 1
        spent = self.alpha * min(max(taken, 0), self.looks) / self.looks
        if taken < 1:
            return Look(verdict=None, interval=interval, alpha_spent=spent)
        verdict = three_way(interval, self.tolerance, self.better)
        if verdict is not Verdict.INCONCLUSIVE:
            return Look(verdict=verdict, interval=interval, alpha_spent=spent)
        if distance.new < self.most_pairs:
            return Look(verdict=None, interval=interval, alpha_spent=spent)
        return Look(verdict=verdict, interval=interval, alpha_spent=spent, settled_by=self._settled_by(distance))

    def _interval(self, distance: Distance) -> Interval:
        passing = PASS_ALPHA / min(_PASS_LOOKS, self.looks)
        return interval_of(distance, self.alpha / self.looks, pass_alpha=passing)

    def _settled_by(self, distance: Distance) -> str:
        for more in range(1, _MOST_MORE + 1):
            verdict = three_way(self._interval(distance.grown(new=more)), self.tolerance, self.better)
            if verdict is not Verdict.INCONCLUSIVE:
                return f"{more} more {'pair' if more == 1 else 'pairs'}"
        return f"more than {_MOST_MORE} pairs: the change lies at the limit"
