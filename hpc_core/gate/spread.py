"""Judge a number that also moves with the host, such as energy: it is worse if it is beyond what accepted sessions move by themselves.

Such a number differs by 3 to 70 % between sessions of the same code, so most of its intervals lie on both sides of any useful
limit. INCONCLUSIVE would then be the rule, so it is PASS unless the interval says worse, and the reason says what would be seen.
A limit that an owner states is decided three ways, as busy time is.
"""

from __future__ import annotations

import math
import statistics

import msgspec

from hpc_core.gate.busy import BusyFinding, Evidence
from hpc_core.gate.intervals import Interval, Spread, interval_of, required_sample_size, stored_distance, three_way
from hpc_core.gate.verdict import Verdict
from hpc_core.record import units as sizes
from hpc_core.record.record import Metric

LEAST_SESSIONS = 2
"""Accepted sessions from which on a spread is known at all."""
GROSS_RATIO = 1.0
"""+100 %: what is worse even if nothing is known of the spread."""
ASSUMED = Spread(
    within=0.03,
    between=0.10,
    degrees=5.0,
    source="between the pooled 5.8 % of our engines (23 cases) and 13.5 % of stock ones (18 cases) on several H100s and H200s",
)
"""What a session's energy moves by, until five are stored. Within: the age of the counter's readings."""


def judge_spread(name: str, new: Metric, old: Metric, ratio: float, evidence: Evidence, *, stated: bool) -> BusyFinding:
    """Return the verdict on one number; `ratio` is its tolerance, `stated` whether the case's owner stated it.

    A session counts with one value. Where none holds the metric, the accepted value is the only one.
    """
    sessions = [[statistics.median(each)] for each in evidence.sessions.get(name, ()) if each] or [[float(old.value)]]
    if not all(math.isfinite(value) and value > 0 for (value,) in ([new.value], *sessions)):
        text = f"; but this or an accepted session holds an {name} that is not above 0."
        return BusyFinding(verdict=Verdict.INVALID, text=text)
    distance = stored_distance([float(new.value)], sessions, ASSUMED)
    interval = interval_of(distance, evidence.alpha, pass_alpha=evidence.pass_alpha)
    verdict = three_way(interval, ratio, new.better)
    text = f": {_percent(interval.low)} to {_percent(interval.high)} by {interval.text}"
    if stated:
        found = BusyFinding(verdict=verdict, text=f"{text}.", interval=interval)
        if verdict is not Verdict.INCONCLUSIVE:
            return found
        required = required_sample_size(distance, evidence.alpha, ratio, new.better)
        undecided = f"{text}; it lies on both sides of the limit."
        return msgspec.structs.replace(found, text=undecided, settled_by=required)
    gross = _gross(math.expm1(distance.centre), new)
    if len(sessions) < LEAST_SESSIONS:
        return BusyFinding(verdict=gross, text=f"; one accepted session shows no spread, so only {_GROSS} counts.")
    if gross is not Verdict.PASS:
        return BusyFinding(verdict=gross, text=f"{text}; {_GROSS} counts whatever the spread.", interval=interval)
    if verdict in (Verdict.REGRESSED, Verdict.IMPROVED):
        return BusyFinding(verdict=verdict, text=f"{text}.", interval=interval)
    seen = _percent(min(detected(interval, ratio), GROSS_RATIO))
    return BusyFinding(verdict=Verdict.PASS, text=f"{text}; from {seen} on it would be REGRESSED.", interval=interval)


def detected(interval: Interval, ratio: float) -> float:
    """Return the smallest change whose interval lies beyond the tolerance as a whole."""
    return (1 + ratio) * (1 + interval.centre) / (1 + interval.low) - 1


def _gross(change: float, metric: Metric) -> Verdict:
    worse, better = change > GROSS_RATIO, change < 1 / (1 + GROSS_RATIO) - 1
    if metric.better == "higher":
        worse, better = better, worse
    return Verdict.REGRESSED if worse else Verdict.IMPROVED if better else Verdict.PASS


def _percent(ratio: float) -> str:
    return sizes.percent(round(ratio, 3))


_GROSS = _percent(GROSS_RATIO)
