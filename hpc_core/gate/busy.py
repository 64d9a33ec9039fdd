"""Judge GPU-busy time against accepted sessions: by an interval, at like clocks and a like share of wall time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

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
from hpc_core.record.record import Better, Metric

Sessions = Mapping[str, Sequence[Sequence[float]]]
"""Values of the accepted sessions by metric, the oldest first, one value per process."""
CLOCK = "sm_clock_mhz"
"""The name under which sessions may also hold their SM clock."""
SHARE_FACTOR = 2.0
"""Busy time is compared while its share of wall time differs by no more. Wall time of like work differed by 1.68 times
between two machine starts, which moved busy time by no more than its spread."""
_CLOCK_STEP = 0.003
"""Clocks within 0.3 %, less than one step of an H100's (15 of 1980 MHz), count as equal."""


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """What a busy metric is judged by, in addition to its own values."""

    sessions: Sessions = {}
    alpha: float
    """Of one metric."""
    pass_alpha: float = PASS_ALPHA
    clock_mhz: float | None = None
    """SM clock of this session; None where it is not known."""
    shares: Mapping[str, float] = {}
    """This session's shares of wall time, by metric."""


class BusyFinding(msgspec.Struct, frozen=True, kw_only=True):
    """The verdict on one busy metric."""

    verdict: Verdict
    text: str
    """What follows the values and the limit: the interval, what it rests on, and why nothing is decided."""
    interval: Interval | None = None
    settled_by: str = ""


def sm_clock_mhz(gpu: Mapping[str, Any]) -> float | None:
    """Return the SM clock of a record's circumstances: the one while the device was busy, else the one after it."""
    busy = gpu.get("busy")
    states = (busy.get("during") if isinstance(busy, Mapping) else None, gpu.get("after"))
    clocks = [state[CLOCK] for state in states if isinstance(state, Mapping) and CLOCK in state]
    return next((float(clock) for clock in clocks if isinstance(clock, int | float) and clock > 0), None)


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
    interval = interval_of(distance, evidence.alpha, pass_alpha=evidence.pass_alpha)
    verdict = three_way(interval, ratio, new.better)
    observed = f": {_range(interval)} by {interval.text}"
    obstacle = _unlike_share(name, distance, evidence) or _clock(name, distance, verdict, ratio, new.better, evidence)
    if obstacle:
        return BusyFinding(verdict=Verdict.INCONCLUSIVE, text=f"{observed}; {obstacle}.", interval=interval)
    if verdict is Verdict.INCONCLUSIVE:
        required = required_sample_size(distance, evidence.alpha, ratio, new.better)
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


def _clock(
    name: str, distance: Distance, verdict: Verdict, ratio: float, better: Better, evidence: Evidence
) -> str | None:
    """Return why a difference is the clock's: it is gone when cycles are compared in place of seconds. None if it is not."""
    clocks = [value for session in evidence.sessions.get(CLOCK, ()) for value in session if value > 0]
    if family_of(name) not in COMPUTE_BOUND or evidence.clock_mhz is None or not clocks:
        return None
    if verdict not in (Verdict.REGRESSED, Verdict.IMPROVED):
        return None
    old = statistics.median(clocks)
    moved = math.log(evidence.clock_mhz / old)
    if abs(moved) <= _CLOCK_STEP:
        return None
    cycles = msgspec.structs.replace(distance, centre=distance.centre + moved)
    if three_way(interval_of(cycles, evidence.alpha), ratio, better) is verdict:
        return None
    by = sizes.percent(_rounded(math.expm1(cycles.centre)))
    return f"clock: the SM ran at {evidence.clock_mhz:.0f} MHz, before at {old:.0f} MHz, and in cycles it is {by}"


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
    return abs(statistics.median(values) / accepted.value - 1) <= allowed_ratio(name, accepted, None)
