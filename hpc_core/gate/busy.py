"""Judge GPU-busy time against accepted sessions: by an interval, at equal clocks and a like share of wall time.

A power cap holds down the SM clock, and by how much differs from card to card. Seconds then tell the code's change and the
clock's together. One law holds for any work: a lower clock makes it slower by at most the ratio of the clocks. So the code's
change lies between the change of the seconds and that of the cycles, and the verdict is on both.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from hpc_core.gate.intervals import (
    COMPUTE_BOUND,
    PASS_ALPHA,
    SPREADS,
    Distance,
    Interval,
    family_of,
    interval_of,
    required_sample_size,
    stored_distance,
    three_way,
)
from hpc_core.gate.tolerance import allowed_ratio
from hpc_core.gate.verdict import Verdict
from hpc_core.record import units as sizes
from hpc_core.record.gpu_state import clock_of, throttle_words
from hpc_core.record.record import Metric, Record

Sessions = Mapping[str, Sequence[Sequence[float]]]
"""Values of the accepted sessions by metric, the oldest first, one value per process."""
CLOCK = "sm_clock_mhz"
"""The metric that holds the SM clock of each process."""
SHARE_FACTOR = 2.0
"""Busy time is compared while its share of wall time differs by no more. Wall time of like work differed by 1.68 times
between two machine starts, which moved busy time by no more than its spread."""
_CLOCK_STEP = 0.003
"""Clocks within 0.3 %, less than one step of an H100's (15 of 1980 MHz), are no reason for a verdict."""


class Clock(msgspec.Struct, frozen=True, kw_only=True):
    """The SM clock of a session while its busy time was measured."""

    mhz: float | None = None
    """The median over its processes of each one's mean; None where it was not recorded."""
    possible_mhz: float | None = None
    """The highest clock of this model of GPU, so also of a session that did not record its own."""
    lowered_by: tuple[str, ...] = ()
    """What held it down: "power cap"."""


def clock_of_session(record: Record) -> Clock:
    """Return the clock that a record holds."""
    metric = record.metrics.get(CLOCK)
    around = record.circumstances
    found = map(clock_of, (around.gpu, *(process.gpu for process in record.processes)))
    clocks = [clock for clock in found if clock is not None]
    reasons = {word for clock in clocks for word in throttle_words(clock.reasons)}
    noted = (note.removeprefix("GPU ") for note in around.notes)
    flagged = {
        text for text in (*noted, *(flag for each in record.processes for flag in each.flags)) if "throttled: " in text
    }
    return Clock(
        mhz=None if metric is None or metric.value <= 0 else float(metric.value),
        possible_mhz=max((clock.possible_mhz for clock in clocks if clock.possible_mhz), default=None),
        lowered_by=tuple(sorted(reasons or flagged)),
    )


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """What a time is judged by, in addition to its own values."""

    sessions: Sessions = {}
    alpha: float
    """Of one metric."""
    pass_alpha: float = PASS_ALPHA
    clock: Clock = Clock()
    """Of this session."""
    paired: str = "hpc-core ab"
    """The command that compares both sides on one card."""
    shares: Mapping[str, float] = {}
    """This session's shares of wall time, by metric."""
    processes: Mapping[str, Sequence[float]] = {}
    """This session's values by metric, one per process, or per pass where all are of one process."""
    one: Literal["process", "pass"] = "process"


class BusyFinding(msgspec.Struct, frozen=True, kw_only=True):
    """The verdict on one busy metric."""

    verdict: Verdict
    text: str
    """What follows the values and the limit: the interval, what it rests on, and why nothing is decided."""
    interval: Interval | None = None
    settled_by: str = ""


def judge_busy(name: str, new: Metric, old: Metric, ratio: float, evidence: Evidence) -> BusyFinding:
    """Return the verdict on one busy metric; `ratio` is its tolerance.

    It is compared with the sessions that hold the metric; where none does, the accepted value is the only one.
    """
    values = _values(new)
    sessions = tuple(evidence.sessions.get(name, ())) or (_values(old),)
    if not all(_proves(session) for session in (values, *sessions)):
        return BusyFinding(
            verdict=Verdict.INVALID, text=f"; but a process or an accepted session holds a {name} that is not above 0."
        )
    distance = stored_distance(values, sessions, SPREADS[family_of(name)])
    seconds = interval_of(distance, evidence.alpha, pass_alpha=evidence.pass_alpha)
    observed = f": {_range(seconds)} by {seconds.text}"
    if (obstacle := _unlike_share(name, distance, evidence)) is not None:
        return BusyFinding(verdict=Verdict.INCONCLUSIVE, text=f"{observed}; {obstacle}.", interval=seconds)
    moved = _moved(len(sessions), evidence)
    interval = _without_the_clock(seconds, moved)
    verdict = three_way(interval, ratio, new.better)
    if verdict is Verdict.INCONCLUSIVE and moved.faster and family_of(name) not in COMPUTE_BOUND:
        # Decoding reads weights, at the memory's clock: a higher SM clock hides no slower code, though it may explain a gain.
        passes = three_way(seconds, ratio, new.better) in (Verdict.PASS, Verdict.IMPROVED)
        verdict = Verdict.PASS if passes else verdict
    if moved.text and interval != seconds:
        observed += f"; {moved.text}, so the code's part is {_range(interval)}"
    if verdict is Verdict.INCONCLUSIVE and moved.text:
        required = f"an A/B on one card, because of {moved.text} ({evidence.paired})"
        return BusyFinding(verdict=verdict, text=f"{observed}.", interval=interval, settled_by=required)
    if verdict is Verdict.INCONCLUSIVE:

        def decides(more: Distance) -> bool:
            found = three_way(interval_of(more, evidence.alpha), ratio, new.better)
            return found is not Verdict.INCONCLUSIVE

        required = required_sample_size(distance, decides)
        text = f"{observed}; it lies on both sides of the limit."
        return BusyFinding(verdict=verdict, text=text, interval=interval, settled_by=required)
    return BusyFinding(verdict=verdict, text=f"{observed}.", interval=interval)


def _values(metric: Metric) -> tuple[float, ...]:
    return metric.samples or (float(metric.value),)


def _proves(session: Sequence[float]) -> bool:
    return bool(session) and all(math.isfinite(value) and value > 0 for value in session)


def _range(interval: Interval) -> str:
    return f"{sizes.percent(_rounded(interval.low))} to {sizes.percent(_rounded(interval.high))}"


def _rounded(ratio: float) -> float:
    """Return the ratio to a hundredth of a percent: an interval has no more digits."""
    return round(ratio, 4)


def _unlike_share(name: str, distance: Distance, evidence: Evidence) -> str | None:
    """Return why busy time is not compared across so different a share of wall time; None if it can be.

    A share also moves because busy time itself did. That is no obstacle.
    """
    share = "busy_share_prefill" if family_of(name) == "prefill" else "busy_share"
    stored = [value for session in evidence.sessions.get(share, ()) for value in session if value > 0]
    new = evidence.shares.get(share, 0.0)
    if not stored or new <= 0:
        return None
    old = statistics.median(stored)
    moved, most = math.log(new / old), math.log(SHARE_FACTOR)
    if min(abs(moved), abs(moved - distance.centre)) <= most:
        return None
    return (
        f"the device was busy for {new:.0%} of the time, before for {old:.0%}, more than {SHARE_FACTOR:g} times apart"
    )


class _Moved(msgspec.Struct, frozen=True):
    """What the clock alone can have done to a time, in log ratio."""

    slower: float = 0.0
    """At most so much slower than before, 0 or above."""
    faster: float = 0.0
    """At most so much faster, 0 or above."""
    text: str = ""
    """"clock 1,770 → 1,650 MHz under the power cap"; empty if the clock is no reason for a verdict."""


def _moved(count: int, evidence: Evidence) -> _Moved:
    """Return what the clock can have done; `count` is how many sessions the time is compared with.

    A stored session without a clock may have run at the card's highest.
    """
    new = evidence.clock
    if new.mhz is None:
        # Older records flag a throttled clock by one reading, which does not say how far it was held down.
        text = f"a clock of unknown height ({', '.join(new.lowered_by)})"
        return _Moved(slower=math.inf, text=text) if new.lowered_by else _Moved()
    stored = [statistics.median(session) for session in evidence.sessions.get(CLOCK, ()) if _proves(session)]
    unknown = count - len(stored)
    highest = max(new.possible_mhz or new.mhz, new.mhz)
    old = statistics.geometric_mean([*stored, *[highest] * unknown]) if stored or unknown > 0 else highest
    change = math.log(new.mhz / old)
    if abs(change) <= _CLOCK_STEP:
        return _Moved(slower=max(0.0, -change))
    cause = f" under the {', '.join(new.lowered_by)}" if new.lowered_by else ""
    before = f"unknown (up to {highest:,.0f})" if unknown > 0 else f"{old:,.0f}"
    text = f"clock {before} → {new.mhz:,.0f} MHz{cause}"
    return _Moved(slower=max(0.0, -change), faster=max(0.0, change) if unknown <= 0 else 0.0, text=text)


def _without_the_clock(seconds: Interval, moved: _Moved) -> Interval:
    """Return where the code's change lies: from the change of the seconds to that of the cycles."""
    low, high = math.exp(-moved.slower), math.exp(moved.faster)

    def scaled(ratio: float, by: float) -> float:
        return (1 + ratio) * by - 1

    return msgspec.structs.replace(
        seconds,
        low=scaled(seconds.low, low),
        pass_low=scaled(seconds.pass_low, low),
        high=scaled(seconds.high, high),
        pass_high=scaled(seconds.pass_high, high),
    )


def sessions_of_regime(sessions: Sequence[Mapping[str, Sequence[float]]], accepted: Mapping[str, Metric]) -> Sessions:
    """Return the values, by metric, of the newest sessions that agree with what is accepted now, the oldest of them first.

    A change that was accepted on purpose is no noise: it begins a new regime. Looking back, the regime ends at the first
    session whose counts are not the accepted ones, or whose busy time lies beyond the tolerance from the accepted one. So
    sessions that differ by more than the tolerance never widen an interval.

    Args:
        sessions: the accepted ones, values by metric, the oldest first.
        accepted: the baseline's metrics.
    """
    regime: list[Mapping[str, Sequence[float]]] = []
    for session in reversed(sessions):
        if not all(_agrees(name, metric, session.get(name)) for name, metric in accepted.items()):
            break
        regime.insert(0, session)
    names = {name for session in regime for name in session}
    return {name: [session[name] for session in regime if name in session] for name in names}


def _agrees(name: str, accepted: Metric, values: Sequence[float] | None) -> bool:
    if not values or not accepted.value:
        return True  # a metric that was not measured then proves nothing
    if accepted.noise == "exact":
        return accepted.unit == "bytes" or all(value == accepted.value for value in values)
    if accepted.noise == "wall":  # it moves with the host; a gross change was accepted on purpose
        ratio = statistics.median(values) / accepted.value
        return 0.5 <= ratio <= 2
    return abs(statistics.median(values) / accepted.value - 1) <= allowed_ratio(name, accepted, None)
