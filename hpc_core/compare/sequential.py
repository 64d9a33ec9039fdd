"""The sequential three-way rule of an A/B: check the pairs so far, and stop when they decide.

A check is made whenever the pairs have grown by a third, so that many pairs cost few checks. Each check is judged at `alpha`
divided by the number of checks, so that together they stay within `alpha` whatever they have in common (union bound). The
passing side is judged at 5 %, where a fifth for each check is enough: simulated in tests/studies/test_error_rates.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from hpc_core.gate.intervals import PASS_ALPHA, Distance, Interval, Spread, interval_of, paired_distance, three_way
from hpc_core.gate.verdict import Verdict
from hpc_core.record.record import Better

_PASS_CHECKS = 5
_MOST_PAIRS = 100


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one check of the pairs so far."""

    verdict: Verdict | None
    """None while undecided and more pairs are allowed."""
    interval: Interval | None
    """None before the first check."""
    alpha_spent: float
    """The highest probability of a false REGRESSED at this check or an earlier one."""
    required: str = ""
    """A sentence that says what would decide, if the last pair left it undecided."""


class Sequential(msgspec.Struct, frozen=True):
    """The rule. Call `check` with all pairs so far, after each pair; between checks it decides nothing.

    Args:
        alpha: of a false REGRESSED, over all checks together.
        tolerance: the allowed ratio, such as 0.005.
        least_pairs: pairs before the first check.
        most_pairs: pairs after which an undecided comparison is INCONCLUSIVE.
        better: direction of the metric.
        spread: of processes, where it is known; None estimates it from the pairs alone, as for wall time.

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
            raise ValueError(f"Not a rule: {self}.")

    @property
    def check_points(self) -> tuple[int, ...]:
        """The numbers of pairs at which a check is made: `least_pairs`, then a third more each time, and `most_pairs`."""
        found = [self.least_pairs]
        while found[-1] < self.most_pairs:
            found.append(min(self.most_pairs, math.ceil(found[-1] * 4 / 3)))
        return tuple(found)

    def check(self, base: Sequence[float], head: Sequence[float]) -> Check:
        """Judge all pairs so far, one value a process, in seconds or anything else above 0.

        Raises:
            ValueError: sides of different length, or a value that is not above 0.
        """
        if len(base) < self.least_pairs and len(base) == len(head):
            return Check(verdict=None, interval=None, alpha_spent=0.0)
        distance = paired_distance(base, head, self.spread)
        interval = self._interval(distance)
        spent = self.alpha * sum(at <= distance.new for at in self.check_points) / len(self.check_points)
        if distance.new < self.most_pairs and distance.new not in self.check_points:
            return Check(verdict=None, interval=interval, alpha_spent=spent)
        verdict = three_way(interval, self.tolerance, self.better)
        if verdict is not Verdict.INCONCLUSIVE:
            return Check(verdict=verdict, interval=interval, alpha_spent=spent)
        if distance.new < self.most_pairs:
            return Check(verdict=None, interval=interval, alpha_spent=spent)
        return Check(verdict=verdict, interval=interval, alpha_spent=spent, required=self._required(distance))

    def _interval(self, distance: Distance) -> Interval:
        passing = PASS_ALPHA / min(_PASS_CHECKS, len(self.check_points))
        return interval_of(distance, self.alpha / len(self.check_points), pass_alpha=passing)

    def _required(self, distance: Distance) -> str:
        run = distance.new
        for pairs in range(run + 1, _MOST_PAIRS + 1):
            grown = distance.grown(new=pairs - run)
            if three_way(self._interval(grown), self.tolerance, self.better) is not Verdict.INCONCLUSIVE:
                return f"About {pairs} pairs like these would decide it ({run} were run)."
        return f"More than {_MOST_PAIRS} pairs like these ({run} were run), a quieter machine, or another tolerance would decide it."
