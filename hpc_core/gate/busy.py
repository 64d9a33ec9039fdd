"""Judge GPU-busy time against accepted sessions: by interval and tolerance, at like clocks and a like share of wall time. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from hpc_core.gate.distance import Distance, stored_distance
from hpc_core.gate.interval import Interval, interval_of, three_way
from hpc_core.gate.sample_size import settled_by
from hpc_core.gate.spread import COMPUTE_BOUND, SPREADS, family_of
from hpc_core.gate.verdict import Verdict
from hpc_core.record import units as sizes
from hpc_core.record.record import Better, Metric

__all__ = ["CLOCK", "SHARE_FACTOR", "BusyFinding", "Evidence", "Sessions", "judge_busy", "sm_clock_mhz"]

Sessions = Mapping[str, Sequence[Sequence[float]]]
"""Values of the accepted sessions by metric, the oldest first, one value a process each."""
CLOCK = "sm_clock_mhz"
"""The name under which sessions may also hold their SM clock."""
SHARE_FACTOR = 2.0
"""Busy time is compared while its share of wall time differs by no more. Wall time of like work was seen to differ by 1.68 times
between two machine starts, and that moved busy time by no more than its spread."""
_CLOCK_STEP = 0.003
"""Clocks within 0.3 %, less than one step of an H100's (15 of 1980 MHz), count as equal."""


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """What judging a busy metric takes beside its own values."""

    sessions: Sessions = {}
    alpha: float
    """Of one metric."""
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
    """The SM clock that a record's circumstances hold: the one seen while the device was busy, else the one after it."""
    busy = gpu.get("busy")
    states = (busy.get("during") if isinstance(busy, Mapping) else None, gpu.get("after"))
    clocks = [state[CLOCK] for state in states if isinstance(state, Mapping) and CLOCK in state]
    return next((float(clock) for clock in clocks if isinstance(clock, int | float) and clock > 0), None)


def judge_busy(name: str, new: Metric, old: Metric, ratio: float, evidence: Evidence) -> BusyFinding:
    """The verdict on one busy metric; `ratio` is its tolerance.

    Sessions that hold it count; where none does, the accepted value is the only one.
    """
    values = _values(new)
    sessions = tuple(evidence.sessions.get(name, ())) or (_values(old),)
    if not all(_proves(session) for session in (values, *sessions)):
        return BusyFinding(
            verdict=Verdict.INVALID, text=f"; but a process or an accepted session holds a {name} that is not above 0."
        )
    distance = stored_distance(values, sessions, SPREADS[family_of(name)])
    interval = interval_of(distance, evidence.alpha)
    verdict = three_way(interval, ratio, new.better)
    seen = f": {_range(interval)} by {interval.text}"
    obstacle = _unlike_share(name, distance, evidence) or _clock(name, distance, verdict, ratio, new.better, evidence)
    if obstacle:
        return BusyFinding(verdict=Verdict.INCONCLUSIVE, text=f"{seen}; {obstacle}.", interval=interval)
    if verdict is Verdict.INCONCLUSIVE:
        settled = settled_by(distance, evidence.alpha, ratio, new.better)
        text = f"{seen}; it lies on both sides of the limit."
        return BusyFinding(verdict=verdict, text=text, interval=interval, settled_by=settled)
    return BusyFinding(verdict=verdict, text=f"{seen}.", interval=interval)


def _values(metric: Metric) -> tuple[float, ...]:
    return metric.samples or (float(metric.value),)


def _proves(session: Sequence[float]) -> bool:
    return bool(session) and all(math.isfinite(value) and value > 0 for value in session)


def _range(interval: Interval) -> str:
    return f"{sizes.percent(_rounded(interval.low))} to {sizes.percent(_rounded(interval.high))}"


def _rounded(ratio: float) -> float:
    """To a hundredth of a percent; more digits than an interval has."""
    return round(ratio, 4)


def _unlike_share(name: str, distance: Distance, evidence: Evidence) -> str | None:
    """Why busy time of so different a share of wall time is not compared.

    A share also moves because busy time itself did; that is no obstacle, and is left out.
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
    """Why a difference is one of the clock: it is gone when cycles are compared instead of seconds."""
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
