"""How far a new session lies from stored ones, or head from base, and how well that is known. Pure; in log ratios.

The unit of replication is the process and the session, never the round: rounds of one process share its luck. Busy time has a
part that varies within a machine start, between processes, and a part that varies between starts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import msgspec

from hpc_core.gate.spread import Spread

__all__ = ["LEAST_SESSIONS", "Distance", "paired_distance", "stored_distance"]

LEAST_SESSIONS = 5
"""From so many stored sessions on, they alone say how much sessions differ (reference/gating.md 4.1 (d))."""
FLOOR = 0.0003
"""0.03 %: the least standard deviation of a session that is believed, however alike a few of them look."""
_UNKNOWN = 1.0
"""Degrees of freedom where nothing is known: with an infinite deviation they do not matter."""

# Variance of the median of n normal values of variance 1, for n from 1 on; beyond, π/2n. Integrals of the order statistics, as
# in Sarhan and Greenberg, Contributions to Order Statistics (1962); tests/test_gate_interval.py draws them again.
_MEDIAN_VARIANCE = (1.0, 0.5, 0.44867, 0.29818, 0.28683, 0.21472, 0.21045, 0.16818, 0.16610)


class Distance(msgspec.Struct, frozen=True, kw_only=True):
    """How far new lies from old in log ratio, and how well that is known; can say so for more processes or sessions."""

    centre: float
    session_variance: float = 0.0
    """Of one session's median, within part included; 0 in an A/B, where both sides are of one session."""
    process_variance: float
    """Of one process; in an A/B of one pair's difference."""
    new: int
    """Processes of the new session; pairs in an A/B."""
    sessions: int = 0
    """Stored sessions; 0 in an A/B."""
    stored: float = 0.0
    """Variance of a stored session's median in units of `process_variance`, mean over the sessions."""
    assumed: float = 0.0
    """Degrees of freedom of what is assumed beside the data; 0 if nothing is."""
    text: str

    @property
    def deviation(self) -> float:
        """Standard deviation of `centre`.

        sqrt(between * (1 + 1/K) + within * (1/n_new + 1/sum n)), where between is the sessions' variance less its within
        part, and never less than 0; a median of n counts for less than n. More processes than the stored sessions have
        narrow nothing below what those sessions show.
        """
        if not self.sessions:
            return math.sqrt(self.process_variance / self.new)
        ours, theirs = _median_variance(self.new), self.stored
        extra = max(0.0, ours - theirs) * self.process_variance
        seen = self.session_variance * (1 + 1 / self.sessions) + extra
        least = self.process_variance * (ours + theirs / self.sessions)
        return math.sqrt(max(seen, least))

    @property
    def degrees(self) -> float:
        """Degrees of freedom: those of the least known part."""
        if not self.sessions:
            return max(self.assumed + self.new - 1, _UNKNOWN)
        assumed = self.assumed if self.sessions < LEAST_SESSIONS else 0.0
        return max(assumed + self.sessions - 1, _UNKNOWN)

    def grown(self, *, new: int = 0, sessions: int = 0) -> Distance:
        """The same with so many more processes (pairs), or stored sessions like these."""
        return msgspec.structs.replace(self, new=self.new + new, sessions=self.sessions + sessions)


def stored_distance(
    new: Sequence[float], sessions: Sequence[Sequence[float]], spread: Spread | None, *, floor: float = FLOOR
) -> Distance:
    """New session against the mean of the stored ones, one value a process.

    `spread` is what is assumed while fewer than `LEAST_SESSIONS` are stored; it counts as `spread.degrees` more degrees of
    freedom. None: nothing is assumed, and a single session leaves an infinite deviation.

    Raises:
        ValueError: no process, no session, or a value that is not above 0.
    """
    logs = [_logs(session) for session in sessions]
    ours = _logs(new)
    if not logs:
        raise ValueError("An interval needs at least one stored session.")
    medians = [statistics.median(session) for session in logs]
    process = _process_variance([*logs, ours], spread)
    if len(logs) >= LEAST_SESSIONS:  # then what is assumed is only the least: it must not hide what the processes show
        process = max(process, _process_variance([*logs, ours], None))
    stored = statistics.fmean(_median_variance(len(session)) for session in logs)
    count = len(logs)
    squares = _squares(medians)
    enough = count >= LEAST_SESSIONS
    if spread is None or enough:
        variance = squares / (count - 1) if count > 1 else math.inf
    else:
        expected = spread.between**2 + process * stored
        variance = (spread.degrees * expected + squares) / (spread.degrees + count - 1)
    word = "1 session" if count == 1 else f"{count} sessions"
    assumed = "" if spread is None or enough else f", between sessions {_percent(spread.between)} assumed"
    return Distance(
        centre=statistics.median(ours) - statistics.fmean(medians),
        session_variance=max(variance, floor**2),
        process_variance=process,
        new=len(ours),
        sessions=count,
        stored=stored,
        assumed=0.0 if spread is None else spread.degrees,
        text=f"{_processes(len(ours))} against {word}{assumed}",
    )


def paired_distance(base: Sequence[float], head: Sequence[float], spread: Spread | None = None) -> Distance:
    """Head against base in pairs of processes of one session; only the spread within a start counts.

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
        text="1 pair" if len(pairs) == 1 else f"{len(pairs)} pairs",
    )


def _logs(values: Sequence[float]) -> list[float]:
    if not values or not all(value > 0 for value in values):
        raise ValueError(f"An interval needs values above 0, one a process, got {list(values)}.")
    return [math.log(value) for value in values]


def _squares(values: Sequence[float]) -> float:
    """Sum of squares about the mean."""
    mean = statistics.fmean(values)
    return math.fsum((value - mean) ** 2 for value in values)


def _process_variance(sessions: Sequence[Sequence[float]], spread: Spread | None) -> float:
    """Pooled over the sessions, with what is assumed of it."""
    degrees = 0.0 if spread is None else spread.degrees
    known = degrees + sum(len(session) - 1 for session in sessions)
    expected = 0.0 if spread is None else degrees * spread.within**2
    return (expected + math.fsum(_squares(session) for session in sessions)) / known if known else 0.0


def _median_variance(count: int) -> float:
    return _MEDIAN_VARIANCE[count - 1] if count <= len(_MEDIAN_VARIANCE) else math.pi / 2 / count


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.2g} %"


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"
