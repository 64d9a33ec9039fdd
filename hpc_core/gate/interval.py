"""Intervals for the ratio of new to old, less 1, and the three-way verdict that one gives. Pure.

Two levels, since two errors cost differently. REGRESSED is judged at `alpha`, the test's share of the suite's false alarms.
PASS and IMPROVED are judged at `PASS_ALPHA`: how often a change as large as the tolerance may pass.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence

import msgspec

from hpc_core.gate.distance import LEAST_SESSIONS, Distance, paired_distance, stored_distance
from hpc_core.gate.spread import Spread
from hpc_core.gate.verdict import Verdict
from hpc_core.record.record import Better

__all__ = [
    "PASS_ALPHA",
    "Interval",
    "busy_interval",
    "history_interval",
    "interval_of",
    "paired_interval",
    "t_quantile",
    "three_way",
]

PASS_ALPHA = 0.05
WALL_FLOOR = 0.003
"""0.3 %: the least standard deviation between sessions of wall time that is believed."""


class Interval(msgspec.Struct, frozen=True, kw_only=True):
    """Where new/old - 1 lies. Each bound is one-sided: it is wrong with probability `alpha`."""

    centre: float
    low: float
    high: float
    alpha: float
    pass_low: float
    """The bounds at `PASS_ALPHA`, inside the others."""
    pass_high: float
    text: str
    """What it rests on: "3 processes against 5 sessions"."""


def interval_of(distance: Distance, alpha: float, *, pass_alpha: float = PASS_ALPHA) -> Interval:
    """The interval that a distance gives, by Student's t.

    Raises:
        ValueError: a level that is not between 0 and 0.5.
    """
    if not 0 < alpha < 0.5 or not 0 < pass_alpha < 0.5:
        raise ValueError(f"A level lies between 0 and 0.5, got {alpha} and {pass_alpha}.")
    deviation, degrees = distance.deviation, distance.degrees
    outer = _reach(deviation, degrees, alpha)
    inner = _reach(deviation, degrees, max(alpha, pass_alpha))
    return Interval(
        centre=_ratio(distance.centre),
        low=_ratio(distance.centre - outer),
        high=_ratio(distance.centre + outer),
        alpha=alpha,
        pass_low=_ratio(distance.centre - inner),
        pass_high=_ratio(distance.centre + inner),
        text=distance.text,
    )


def busy_interval(new: Sequence[float], sessions: Sequence[Sequence[float]], spread: Spread, alpha: float) -> Interval:
    """GPU-busy time of this session's processes against that of the accepted sessions'."""
    return interval_of(stored_distance(new, sessions, spread), alpha)


def paired_interval(
    base: Sequence[float],
    head: Sequence[float],
    alpha: float,
    *,
    pass_alpha: float = PASS_ALPHA,
    spread: Spread | None = None,
) -> Interval:
    """One value a process, in pairs of an ABBA order. With `spread`, what is known of processes counts beside the pairs."""
    return interval_of(paired_distance(base, head, spread), alpha, pass_alpha=pass_alpha)


def history_interval(
    new: Sequence[float],
    sessions: Sequence[Sequence[float]],
    alpha: float,
    *,
    canary: Sequence[float] = (),
    canaries: Sequence[Sequence[float]] = (),
) -> Interval:
    """Wall time against at least five stored sessions; with a canary in every one, the machine's drift is taken out.

    `canary` is the code-independent work's time in this session, `canaries` the same of the stored ones, in their order.
    Fewer than five sessions give an interval without bounds, which says so.
    """
    steady = bool(canary) and len(canaries) == len(sessions) and all(canaries)
    if steady:
        new = _relative_to(new, canary)
        sessions = [_relative_to(one, other) for one, other in zip(sessions, canaries, strict=True)]
    distance = stored_distance(new, sessions, None, floor=WALL_FLOOR)
    beside = ", drift by the canary taken out" if steady else ", no canary in each of them"
    if len(sessions) < LEAST_SESSIONS:
        text = f"{len(sessions)} of the {LEAST_SESSIONS} stored sessions that wall time needs"
        distance = msgspec.structs.replace(distance, session_variance=math.inf, text=text)
        return interval_of(distance, alpha)
    return interval_of(msgspec.structs.replace(distance, text=distance.text + beside), alpha)


def three_way(interval: Interval, tolerance: float, better: Better) -> Verdict:
    """REGRESSED if the whole interval is beyond the tolerance on the worse side; IMPROVED likewise on the better side.

    PASS if what is worse lies within the tolerance, else INCONCLUSIVE. Where neither side is better, both must lie within.
    `tolerance` is a ratio.
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


def _relative_to(values: Sequence[float], canary: Sequence[float]) -> list[float]:
    middle = statistics.median(canary)
    return [value / middle for value in values]


def _reach(deviation: float, degrees: float, alpha: float) -> float:
    return deviation if deviation in (0.0, math.inf) else deviation * t_quantile(1 - alpha, degrees)


@functools.cache
def t_quantile(probability: float, degrees: float) -> float:
    """Quantile of Student's t."""
    from scipy.special import stdtrit  # the gate must load in milliseconds, scipy.stats takes a second

    return float(stdtrit(degrees, probability))


def _ratio(log_ratio: float) -> float:
    try:
        return math.expm1(log_ratio)
    except OverflowError:
        return math.inf
