"""How far a new value lies from accepted ones, how well that is known, and what follows from it.

Samples become a distance in log ratio with its spread, a distance becomes an interval for new / old - 1, and an interval
becomes a three-way verdict. The unit of replication is the process and the session, never the round: rounds of one process
are not independent. GPU-busy time varies between the processes of one machine start, and between machine starts.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec

from hpc_core.gate.verdict import Verdict
from hpc_core.record.metrics import Family, definition_of
from hpc_core.record.record import Better
from hpc_core.record.units import counted

COMPUTE_BOUND: frozenset[Family] = frozenset({"train", "prefill"})
"""Families whose busy time follows the SM clock. Decoding reads weights, at the memory's clock."""
LEAST_SESSIONS = 5
"""From this many stored sessions on, they alone say how much sessions differ."""
PASS_ALPHA = 0.05
"""How often a change as large as the tolerance may pass. REGRESSED is judged at the test's share of the suite's false alarms."""
EARLY_PASS_ALPHA = 0.03
"""The same where further processes run unless the first one passes. A change as large as the tolerance then passes at either
look in at most `PASS_ALPHA` of the runs: sessions differ more than processes, so the looks mostly agree (tests/gate/test_busy.py)."""
FLOOR = 0.0003
"""0.03 %: the least standard deviation of a session. A few sessions may look more alike than they are."""
_UNKNOWN = 1.0
"""Degrees of freedom where nothing is known: with an infinite deviation they do not matter."""
_MOST_PROCESSES = 12
_MOST_SESSIONS = 12

# Variance of the median of n normal values of variance 1, for n from 1 to 9; beyond, π/2n. Integrals of the order statistics,
# as in Sarhan and Greenberg, Contributions to Order Statistics (1962). tests/gate/test_busy.py draws them again.
_MEDIAN_VARIANCE = (1.0, 0.5, 0.44867, 0.29818, 0.28683, 0.21472, 0.21045, 0.16818, 0.16610)


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """How much busy time moves where nothing changed, assumed until a machine has sessions of its own.

    Standard deviations of log values: 0.002 is 0.2 %.
    """

    within: float
    """Between processes of one machine start."""
    between: float
    """Between machine starts."""
    degrees: float
    """Degrees of freedom that the assumption counts for, in addition to those of the stored sessions."""
    source: str
    lasting: bool = False
    """Whether it still counts beside `LEAST_SESSIONS` and more: a handful of sessions alone gives limits too wide to be of use."""


_WITHIN = 0.0015
"""Four cases on four H100 starts, four processes each (bench/studies/error_rates/aa-h100.json): 0.13 % for training and decoding, 0.16 % for prefill, pooled."""
_DEGREES = 10.0
"""A choice, well below what was observed: the spreads below are those of the case that moved most."""


def _between(most: str, spread: float) -> Spread:
    source = f"up to seven H100 starts on several cards: the case that moved most by {most}, rounded up"
    return Spread(within=_WITHIN, between=spread, degrees=_DEGREES, source=source)


SPREADS: dict[Family, Spread] = {
    "train": _between("0.30 %", 0.003),
    "prefill": _between("0.28 %", 0.003),
    "decode": _between("1.01 %", 0.010),
}


def family_of(name: str) -> Family:
    """Return the family of a busy metric. One that the registry does not know counts as training, which has the least spread."""
    definition = definition_of(name)
    return "train" if definition is None or definition.family is None else definition.family


class Distance(msgspec.Struct, frozen=True, kw_only=True):
    """How far new lies from old in log ratio, and how well that is known."""

    centre: float
    session_variance: float = 0.0
    """Of one session's median, the part within a session included; 0 in an A/B, where both sides are of one session."""
    process_variance: float
    """Of one process; in an A/B of one pair's difference."""
    new: int
    """Processes of the new session; pairs in an A/B."""
    sessions: int = 0
    """Stored sessions; 0 in an A/B."""
    stored: float = 0.0
    """Variance of a stored session's median in units of `process_variance`, mean over the sessions."""
    assumed: float = 0.0
    """Degrees of freedom of an assumed spread; 0 if none is assumed."""
    lasting: bool = False
    """Whether they still count from `LEAST_SESSIONS` on."""
    text: str
    """What it rests on: "3 processes against 5 sessions"."""
    can_grow: bool = True
    """Whether more processes can be asked for; passes of a step in the test process cannot."""

    @property
    def deviation(self) -> float:
        """Standard deviation of `centre`.

        sqrt(between * (1 + 1/K) + within * (1/n_new + 1/sum n)), where between is the sessions' variance less its within
        part, and at least 0; the median of n values is less certain than their mean. More processes than the stored sessions
        have do not narrow it below what those sessions show.
        """
        if not self.sessions:
            return math.sqrt(self.process_variance / self.new)
        ours, theirs = _median_variance(self.new), self.stored
        extra = max(0.0, ours - theirs) * self.process_variance
        estimate = self.session_variance * (1 + 1 / self.sessions) + extra
        least = self.process_variance * (ours + theirs / self.sessions)
        return math.sqrt(max(estimate, least))

    @property
    def degrees(self) -> float:
        """Degrees of freedom of the part that is known least."""
        if not self.sessions:
            return max(self.assumed + self.new - 1, _UNKNOWN)
        assumed = self.assumed if self.lasting or self.sessions < LEAST_SESSIONS else 0.0
        return max(assumed + self.sessions - 1, _UNKNOWN)

    def grown(self, *, new: int = 0, sessions: int = 0) -> Distance:
        """Return the distance with this many more processes (or pairs) and stored sessions of the same spread."""
        return msgspec.structs.replace(self, new=self.new + new, sessions=self.sessions + sessions)


def stored_distance(
    new: Sequence[float],
    sessions: Sequence[Sequence[float]],
    spread: Spread | None,
    *,
    floor: float = FLOOR,
    one: Literal["process", "pass"] = "process",
) -> Distance:
    """Return the distance of a new session from the mean of the stored ones; one value per process, or per pass in one process.

    `spread` is assumed while fewer than `LEAST_SESSIONS` are stored, or whatever is stored if it is lasting, and adds
    `spread.degrees` degrees of freedom. Without it, a single session leaves an infinite deviation.

    Raises:
        ValueError: no process, no session, or a value that is not above 0.
    """
    logs = [_logs(session) for session in sessions]
    ours = _logs(new)
    if not logs:
        raise ValueError("An interval needs at least one stored session.")
    medians = [statistics.median(session) for session in logs]
    process = _process_variance([*logs, ours], spread)
    if len(logs) >= LEAST_SESSIONS:  # the assumption must not hide what the processes show
        process = max(process, _process_variance([*logs, ours], None))
    stored = statistics.fmean(_median_variance(len(session)) for session in logs)
    count = len(logs)
    squares = _squares(medians)
    enough = count >= LEAST_SESSIONS and not (spread is not None and spread.lasting)
    if spread is None or enough:
        variance = squares / (count - 1) if count > 1 else math.inf
    else:
        expected = spread.between**2 + process * stored
        variance = (spread.degrees * expected + squares) / (spread.degrees + count - 1)
    assumed = "" if spread is None or enough else f", between sessions {100 * spread.between:.2g} % assumed"
    return Distance(
        centre=statistics.median(ours) - statistics.fmean(medians),
        session_variance=max(variance, floor**2),
        process_variance=process,
        new=len(ours),
        sessions=count,
        stored=stored,
        assumed=0.0 if spread is None else spread.degrees,
        lasting=spread is not None and spread.lasting,
        can_grow=one == "process",
        text=f"{counted(len(ours), one, f'{one}es')} against {counted(count, 'session')}{assumed}",
    )


def paired_distance(base: Sequence[float], head: Sequence[float], spread: Spread | None = None) -> Distance:
    """Return the distance of head from base, in pairs of processes of one session; only the spread within a start counts.

    Raises:
        ValueError: no pair, sides of different length, or a value that is not above 0.
    """
    if len(base) != len(head):
        raise ValueError(f"Pairs need as many values of base as of head, got {len(base)} and {len(head)}.")
    pairs = [after - before for before, after in zip(_logs(base), _logs(head), strict=True)]
    degrees = 0.0 if spread is None else spread.degrees
    known = degrees + len(pairs) - 1
    expected = 0.0 if spread is None else degrees * 2 * spread.within**2
    return Distance(
        centre=statistics.fmean(pairs),
        process_variance=(expected + _squares(pairs)) / known if known else math.inf,
        new=len(pairs),
        assumed=degrees,
        text=counted(len(pairs), "pair"),
    )


def _logs(values: Sequence[float]) -> list[float]:
    if not values or not all(value > 0 for value in values):
        raise ValueError(f"An interval needs values above 0, one per process, got {list(values)}.")
    return [math.log(value) for value in values]


def _squares(values: Sequence[float]) -> float:
    """Return the sum of squares about the mean."""
    mean = statistics.fmean(values)
    return math.fsum((value - mean) ** 2 for value in values)


def _process_variance(sessions: Sequence[Sequence[float]], spread: Spread | None) -> float:
    """Return the variance within sessions, pooled over them and over what is assumed."""
    degrees = 0.0 if spread is None else spread.degrees
    known = degrees + sum(len(session) - 1 for session in sessions)
    expected = 0.0 if spread is None else degrees * spread.within**2
    return (expected + math.fsum(_squares(session) for session in sessions)) / known if known else 0.0


def _median_variance(count: int) -> float:
    return _MEDIAN_VARIANCE[count - 1] if count <= len(_MEDIAN_VARIANCE) else math.pi / 2 / count


class Interval(msgspec.Struct, frozen=True, kw_only=True):
    """Where new / old - 1 lies. Each bound is one-sided: it is wrong with probability `alpha`."""

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
    """Return the interval of a distance by Student's t.

    Raises:
        ValueError: a level that is not between 0 and 0.5.
    """
    if not 0 < alpha < 0.5 or not 0 < pass_alpha < 0.5:
        raise ValueError(f"A level lies between 0 and 0.5, got {alpha} and {pass_alpha}.")
    deviation, degrees = distance.deviation, distance.degrees
    outer = reach(deviation, degrees, alpha)
    inner = reach(deviation, degrees, max(alpha, pass_alpha))
    return Interval(
        centre=_ratio(distance.centre),
        low=_ratio(distance.centre - outer),
        high=_ratio(distance.centre + outer),
        alpha=alpha,
        pass_low=_ratio(distance.centre - inner),
        pass_high=_ratio(distance.centre + inner),
        text=distance.text,
    )


def reach(deviation: float, degrees: float, alpha: float) -> float:
    """Return how far, in log ratio, a value of this deviation exceeds its mean with probability `alpha`, by Student's t."""
    return deviation if deviation in (0.0, math.inf) else deviation * _t_quantile(1 - alpha, degrees)


@functools.cache
def _t_quantile(probability: float, degrees: float) -> float:
    from scipy.special import stdtrit  # the gate must load in milliseconds, scipy.stats takes a second

    return float(stdtrit(degrees, probability))


def _ratio(log_ratio: float) -> float:
    try:
        return math.expm1(log_ratio)
    except OverflowError:
        return math.inf


def three_way(interval: Interval, tolerance: float, better: Better) -> Verdict:
    """Return the verdict of an interval; `tolerance` is a ratio.

    REGRESSED if the whole interval lies beyond the tolerance on the worse side, IMPROVED if it does on the better side, PASS
    if its worse end lies within the tolerance, else INCONCLUSIVE. Where neither side is better, both ends must lie within.
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


def required_sample_size(distance: Distance, decides: Callable[[Distance], bool]) -> str:
    """Return what would decide an INCONCLUSIVE comparison: "2 more processes", "3 more accepted sessions, or an A/B: hpc-core ab".

    An estimate: it assumes that the change and the spread stay what they are now. `decides` is the rule.
    """
    for count in range(1, _MOST_PROCESSES + 1 if distance.can_grow else 1):
        if decides(distance.grown(new=count)):
            return counted(count, "more process", "more processes")
    for count in range(1, _MOST_SESSIONS + 1):
        if decides(distance.grown(sessions=count)):
            return f"{counted(count, 'more accepted session')}, or an A/B: hpc-core ab"
    more = f"{_MOST_PROCESSES} more processes or " if distance.can_grow else ""
    return f"an A/B (hpc-core ab), since {more}{_MOST_SESSIONS} more sessions would not decide it"
