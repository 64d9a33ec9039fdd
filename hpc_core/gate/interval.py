"""Intervals for the ratio of head to base, less 1, and the three-way verdict that one gives. Pure; in log ratios inside.

The unit of replication is the process, never the round: rounds of one process share its luck. Two levels, since two errors
cost differently: REGRESSED is judged at `alpha`, the metric's share of the run's false alarms; PASS and IMPROVED at the wider `pass_alpha`.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence

import msgspec

from hpc_core.gate.verdict import Verdict
from hpc_core.record import Better

__all__ = ["PASS_ALPHA", "Interval", "paired_interval", "t_quantile", "three_way"]

PASS_ALPHA = 0.05


class Interval(msgspec.Struct, frozen=True, kw_only=True):
    """Where head/base - 1 lies. Each bound is one-sided: it is wrong with probability `alpha`."""

    low: float
    high: float
    alpha: float
    pass_low: float
    """The bounds at the level of PASS, inside the others."""
    pass_high: float
    text: str
    """What it rests on: "3 pairs"."""


def paired_interval(
    base: Sequence[float], head: Sequence[float], alpha: float, *, pass_alpha: float = PASS_ALPHA
) -> Interval:
    """The interval of head/base - 1 from one value a process, in pairs of an ABBA order, by Student's t over log ratios.

    Raises:
        ValueError: fewer than two pairs, sides of different length, or a value that is not above 0.
    """
    if len(base) != len(head) or len(base) < 2:
        raise ValueError(
            f"An interval needs two pairs or more, got {len(base)} values of base and {len(head)} of head."
        )
    if not all(value > 0 for value in (*base, *head)):
        raise ValueError(f"An interval needs values above 0, got {list(base)} and {list(head)}.")
    logs = [math.log(after / before) for before, after in zip(base, head, strict=True)]
    centre = statistics.fmean(logs)
    error = statistics.stdev(logs) / math.sqrt(len(logs))
    outer, inner = (
        error * t_quantile(1 - level, len(logs) - 1) if error else 0.0 for level in (alpha, max(alpha, pass_alpha))
    )
    return Interval(
        low=_ratio(centre - outer),
        high=_ratio(centre + outer),
        alpha=alpha,
        pass_low=_ratio(centre - inner),
        pass_high=_ratio(centre + inner),
        text=f"{len(logs)} pairs",
    )


def three_way(interval: Interval, tolerance: float, better: Better) -> Verdict:
    """REGRESSED if the whole interval is beyond the tolerance on the worse side, IMPROVED likewise on the better side.

    PASS if what is worse lies within the tolerance, else INCONCLUSIVE. Where neither side is better, both must lie within.
    """
    if better == "higher":
        low, pass_low, pass_high = -interval.high, -interval.pass_high, -interval.pass_low
    else:
        low, pass_low, pass_high = interval.low, interval.pass_low, interval.pass_high
    if low > tolerance or (better == "same" and interval.high < -tolerance):
        return Verdict.REGRESSED
    if better == "same":
        within = -tolerance <= pass_low and pass_high <= tolerance
        return Verdict.PASS if within else Verdict.INCONCLUSIVE
    if pass_high < -tolerance:
        return Verdict.IMPROVED
    return Verdict.PASS if pass_high <= tolerance else Verdict.INCONCLUSIVE


def _ratio(log_ratio: float) -> float:
    return math.expm1(min(log_ratio, 700.0))


@functools.cache
def t_quantile(probability: float, degrees: int) -> float:
    """Quantile above the median of Student's t with whole degrees of freedom, by halving an interval."""
    low, high = 0.0, 1.0
    while _t_below(high, degrees) < probability:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_below(middle, degrees) < probability else (low, middle)
    return high


def _t_below(t: float, degrees: int) -> float:
    """P(T < t), by the finite sums of Abramowitz and Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine = math.cos(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(3 if odd else 2, degrees - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    inside = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return 0.5 + inside / 2
