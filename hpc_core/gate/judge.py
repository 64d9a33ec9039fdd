"""Judge a record against the baseline that was found for it, or against what was found in its place.

Knows every rule that turns values into verdicts; reads no file, launches nothing, prints nothing. A missing, damaged,
foreign or older baseline is never a PASS.
"""

from __future__ import annotations

import msgspec

from hpc_core.baselines.baseline import (
    Baseline,
    Damaged,
    Lookup,
    Missing,
    OlderSchema,
    gated_metrics,
)
from hpc_core.case.limits import Limits
from hpc_core.gate.busy import Evidence, Sessions, sm_clock_mhz
from hpc_core.gate.family import SUITE_ALPHA, share
from hpc_core.gate.metric import Bench, judge_metric, update_command
from hpc_core.gate.moved import case_changes, packages_moved
from hpc_core.gate.verdict import Judgement, MetricVerdict, Verdict, worst
from hpc_core.record import units as sizes
from hpc_core.record.record import Record

__all__ = ["judge"]


class _Obstacle(msgspec.Struct, frozen=True):
    """Why no metric can be compared with the baseline, and the verdict that this alone gives."""

    verdict: Verdict
    reason: str
    next_step: str


def judge(
    record: Record,
    lookup: Lookup,
    limits: Limits | None = None,
    *,
    sessions: Sessions | None = None,
    alpha: float | None = None,
) -> Judgement:
    """The verdict on a record, given what the store found for its case and machine.

    `sessions` are the accepted sessions' values by metric, one a process, as far as they are of the level that is accepted now;
    without them the baseline's value is the only session. They may also hold shares of wall time and `sm_clock_mhz`.
    `alpha` is the case's share of the suite's false alarms; by default the case is all there is.
    `limits` defaults to those of the record's case. An absolute limit is judged even without a baseline, but a case
    without one is NO_BASELINE at best. A limit on a metric that the record lacks or does not gate is INCOMPATIBLE:
    it was asked for and cannot be kept. A record whose run failed is INVALID and `broken`.
    """
    if record.status != "ok":
        return _unjudged(record)
    named = (record.case.limits if limits is None else limits).named()
    baseline = lookup if isinstance(lookup, Baseline) else None
    obstacle = _obstacle(record, lookup)
    bench = Bench(
        case=record.case.id,
        machine=record.circumstances.machine.key,
        stack=record.circumstances.stack,
        baseline=baseline if obstacle is None else None,
        evidence=_evidence(record, sessions or {}, SUITE_ALPHA if alpha is None else alpha),
    )
    accepted = {} if bench.baseline is None else bench.baseline.metrics
    gated = gated_metrics(record)
    rows = []
    for name in sorted({*gated, *accepted, *named}):
        without = None if obstacle is None else (obstacle.verdict, obstacle.reason, obstacle.next_step)
        shown = record.metrics.get(name)
        rows.append(judge_metric(bench, name, gated.get(name), shown, limit=named.get(name), without=without))
    rows.sort(key=_gravest_first)
    moved = () if baseline is None else packages_moved(baseline.stack, bench.stack)
    return _judgement(record, tuple(rows), obstacle, moved)


def _evidence(record: Record, sessions: Sessions, alpha: float) -> Evidence:
    """What busy metrics are judged by; they divide the case's share of false alarms among themselves."""
    tests = sum(metric.noise == "busy" for metric in gated_metrics(record).values())
    return Evidence(
        sessions=sessions,
        alpha=share(tests, alpha),
        clock_mhz=sm_clock_mhz(record.circumstances.gpu),
        shares={name: float(metric.value) for name, metric in record.metrics.items() if name.startswith("busy_share")},
    )


def _unjudged(record: Record) -> Judgement:
    """A run that failed, or that was not what was asked: no number of it is looked at."""
    failure = record.failure
    if failure is not None:
        reason = f"{failure.kind} in {failure.phase}: {failure.message}"
        step = f"pytest --benchmark --case {record.case.id} --perf-inline"
    else:
        reason = f"invalid: {' '.join(record.reasons)}"
        step = "Make what runs be what the case asks for; the numbers of this run are neither judged nor stored."
    return Judgement(
        case=record.case.id,
        verdict=Verdict.INVALID,
        metrics=(),
        moved=(),
        headline=reason,
        reason=reason,
        next_step=step,
        baseline_path=_path(record),
        broken=failure is not None,
    )


def _path(record: Record) -> str:
    return f"{record.circumstances.machine.key}/{record.case.id}.json"


def _obstacle(record: Record, lookup: Lookup) -> _Obstacle | None:
    case, key = record.case.id, record.circumstances.machine.key
    accept = update_command(case)
    if isinstance(lookup, Missing):
        others = f" There is one for {', '.join(lookup.elsewhere)}." if lookup.elsewhere else ""
        return _Obstacle(Verdict.NO_BASELINE, f"no baseline of {case} for {key}.{others}", accept)
    if isinstance(lookup, Damaged):
        reason = f"baseline damaged: {lookup.reason} ({lookup.path})."
        return _Obstacle(
            Verdict.INVALID, reason, f"Restore it from git (git checkout -- {lookup.path}), or accept anew: {accept}"
        )
    if isinstance(lookup, OlderSchema):
        age = "older" if lookup.found < lookup.known else "newer"
        reason = (
            f"the baseline has the {age} schema {lookup.found}, this hpc-core reads {lookup.known} ({lookup.path})."
        )
        return _Obstacle(
            Verdict.INCOMPATIBLE, reason, f"Accept anew: {accept}" if age == "older" else "Upgrade hpc-core."
        )
    return _of_another_case(record, lookup, accept)


def _of_another_case(record: Record, baseline: Baseline, accept: str) -> _Obstacle | None:
    if baseline.case != record.case.id:
        reason = f"the baseline is of {baseline.case}, not of {record.case.id}: it was copied or renamed by hand."
        return _Obstacle(Verdict.INCOMPATIBLE, reason, f"Accept anew: {accept}")
    if baseline.digest != record.case.digest:
        changes = (
            ", ".join(case_changes(baseline.spec, record.case)) or f"digest {baseline.digest} → {record.case.digest}"
        )
        reason = f"STALE: the case changed since this baseline ({changes}), accepted {baseline.accepted.at}."
        return _Obstacle(Verdict.INCOMPATIBLE, reason, f"Measure and accept it on this machine again: {accept}")
    return None


def _gravest_first(row: MetricVerdict) -> tuple[int, float, str]:
    return -row.verdict.severity, -abs(row.ratio or 0.0), row.metric


def _judgement(
    record: Record, rows: tuple[MetricVerdict, ...], obstacle: _Obstacle | None, moved: tuple[str, ...]
) -> Judgement:
    verdict = worst(row.verdict for row in rows)
    if obstacle is not None:
        verdict = worst((verdict, obstacle.verdict))
    leading = next((row for row in rows if row.verdict is verdict), None)
    if obstacle is not None and verdict is obstacle.verdict:
        headline = reason = obstacle.reason
        step = obstacle.next_step
    elif leading is None:
        verdict = Verdict.NO_BASELINE
        headline = reason = "no gated metric: the record holds nothing that could be compared."
        step = "Gate a metric of this case, or run it without --benchmark."
    else:
        headline, reason, step = _headline(rows, leading), leading.reason, leading.next_step
    return Judgement(
        case=record.case.id,
        verdict=verdict,
        metrics=rows,
        moved=moved,
        headline=headline,
        reason=reason,
        next_step=step,
        baseline_path=_path(record),
    )


def _headline(rows: tuple[MetricVerdict, ...], leading: MetricVerdict) -> str:
    alike = sum(row.verdict is leading.verdict for row in rows) - 1
    more = f" (and {alike} more {leading.verdict.value})" if alike and leading.verdict is not Verdict.PASS else ""
    if leading.limit == "none":
        return f"{leading.reason}{more}"
    if leading.change is not None:
        undecided = f", undecided: it takes {leading.settled_by}" if leading.settled_by else ""
        return f"{leading.metric} {sizes.change(leading.change, leading.unit)}, limit {leading.limit}{undecided}{more}"
    # Judged by an absolute limit alone, so there is no change to show.
    value = "" if leading.new is None else f" {sizes.quantity(leading.new, leading.unit)}"
    return f"{leading.metric}{value}, limit {leading.limit}{more}"
