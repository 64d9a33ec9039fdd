"""Which accepted sessions are of the level that is accepted now: a change that was meant is no noise. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from hpc_core.gate.busy import Sessions
from hpc_core.gate.spread import family_of
from hpc_core.gate.tolerance import BUSY_RATIOS
from hpc_core.record.record import Metric

__all__ = ["sessions_of_level"]


def sessions_of_level(sessions: Sequence[Mapping[str, Sequence[float]]], accepted: Mapping[str, Metric]) -> Sessions:
    """Values by metric of the newest sessions that are alike, the oldest of them first.

    `sessions` are the accepted ones, values by metric, the oldest first; `accepted` are the baseline's metrics. The first
    session, looking back, whose counts are not the accepted ones, or whose busy time lies beyond the tolerance from
    the accepted one, ends the level: it was accepted as another. So sessions that differ by more than the tolerance never widen an
    interval; they were INCONCLUSIVE or worse when they were accepted.
    """
    alike: list[Mapping[str, Sequence[float]]] = []
    for session in reversed(sessions):
        if not all(_alike(name, metric, session.get(name)) for name, metric in accepted.items()):
            break
        alike.insert(0, session)
    return {name: [session[name] for session in alike if name in session] for name in {n for s in alike for n in s}}


def _alike(name: str, accepted: Metric, values: Sequence[float] | None) -> bool:
    if not values or not accepted.value:
        return True  # a metric that was not measured then says nothing
    if accepted.noise == "exact":
        return accepted.unit == "bytes" or all(value == accepted.value for value in values)
    return abs(statistics.median(values) / accepted.value - 1) <= BUSY_RATIOS[family_of(name)]
