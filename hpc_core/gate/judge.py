"""Judge a record against the baseline of its case, or against what was found in its place.

Values in, verdicts out: nothing here reads a file. A missing, damaged, foreign or older baseline is never a PASS.
"""

from __future__ import annotations

from collections.abc import Sequence

from hpc_core.baselines.baseline import (
    Baseline,
    Damaged,
    Lookup,
    Missing,
    OlderSchema,
    gated_metrics,
)
from hpc_core.case.limits import Limits
from hpc_core.gate.busy import Evidence, Sessions, clock_of_session
from hpc_core.gate.comparability import Place, case_changes
from hpc_core.gate.intervals import PASS_ALPHA
from hpc_core.gate.metric import Context, Obstacle, judge_metric, place_of, update_command
from hpc_core.gate.spread import spread_is_known
from hpc_core.gate.suspects import suspects
from hpc_core.gate.verdict import (
    SUITE_ALPHA,
    Judgement,
    MetricVerdict,
    Verdict,
    gravest_first,
    share,
    worst,
    worst_metric,
)
from hpc_core.record import units as sizes
from hpc_core.record.metrics import is_disturbed
from hpc_core.record.record import Record
from hpc_core.record.repeats import values_of_processes, word_of


def judge(
    record: Record,
    lookup: Lookup,
    limits: Limits | None = None,
    *,
    beside: Sequence[Limits] = (),
    sessions: Sessions | None = None,
    alpha: float | None = None,
    pass_alpha: float = PASS_ALPHA,
) -> Judgement:
    """Return the verdict on a record.

    The worst metric decides. A new metric, which the baseline does not hold yet, is not judged: the case keeps its verdict, and
    a remark says how to accept the metric. A metric that the baseline holds and the record lacks is INCOMPATIBLE. An absolute
    limit is judged even without a baseline, but a case without one is NO_BASELINE at best. A limit on a metric that the record
    lacks or does not gate is INCOMPATIBLE. A record whose run failed is INVALID and `broken`.

    Args:
        record: what was observed.
        lookup: the baseline of its case and machine, or what was found in its place.
        limits: of the case; by default those in the record.
        beside: further limits that hold, such as those at a merge base. The strictest counts for each metric.
        sessions: values by metric of the accepted sessions, as far as they agree with the baseline; without them the
            baseline's value is the only session. They may also hold shares of wall time and `sm_clock_mhz`.
        alpha: the case's share of the suite's false alarms; by default the case is the whole suite.
        pass_alpha: how often a change of busy time as large as the tolerance may pass.
    """
    if record.status != "ok":
        return _unjudged(record)
    named = [each.named() for each in (record.case.limits if limits is None else limits, *beside)]
    baseline = lookup if isinstance(lookup, Baseline) else None
    obstacle = _obstacle(record, lookup)
    accepted = {} if baseline is None or obstacle is not None else baseline.metrics
    gated = gated_metrics(record)
    stored = sessions or {}
    tests = sum(
        name in accepted
        and (metric.noise == "busy" or (metric.noise == "wall" and spread_is_known(name, metric.unit, stored)))
        for name, metric in gated.items()
    )
    around = record.circumstances
    place = Place(around.machine.key, around.stack, around.settings, around.python)
    context = Context(
        case=record.case.id,
        place=place,
        baseline=baseline if obstacle is None else None,
        suspects=() if baseline is None else suspects(record.case, place_of(baseline), place),
        evidence=Evidence(
            sessions=stored,
            alpha=share(tests, SUITE_ALPHA if alpha is None else alpha),
            pass_alpha=pass_alpha,
            clock=clock_of_session(record),
            shares={name: float(each.value) for name, each in record.metrics.items() if name.startswith("busy_share")},
            processes=values_of_processes(record),
            one=word_of(record),
            paired=_paired(record, baseline),
        ),
        limited=tuple(
            name
            for name in Limits.__struct_fields__
            if name in gated or (name in record.metrics and is_disturbed(record.metrics[name]))
        ),
    )
    rows = []
    for name in sorted({*gated, *accepted}.union(*named)):
        shown, its_limits = record.metrics.get(name), [each.get(name) for each in named]
        rows.append(judge_metric(context, name, gated.get(name), shown, limits=its_limits, obstacle=obstacle))
    rows.sort(key=gravest_first)
    return _judgement(record, tuple(rows), obstacle, context.suspects)


def _paired(record: Record, baseline: Baseline | None) -> str:
    """Return the command that compares the accepted code with this one in pairs of processes on one card."""
    accepted = None if baseline is None else baseline.accepted.commit
    of_user = " --cases FILE" if record.case.model is None else ""
    return f"hpc-core ab {'REVISION' if accepted is None else accepted[:10]}{of_user} --case {record.case.id}"


def _unjudged(record: Record) -> Judgement:
    """Return the judgement of a run that failed, or that was not what the case asks for: its numbers do not count."""
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


def _obstacle(record: Record, lookup: Lookup) -> Obstacle | None:
    case, key = record.case.id, record.circumstances.machine.key
    accept = update_command(case)
    if isinstance(lookup, Missing):
        others = f" There is one for {', '.join(lookup.elsewhere)}." if lookup.elsewhere else ""
        return Obstacle(Verdict.NO_BASELINE, f"no baseline of {case} for {key}.{others}", accept)
    if isinstance(lookup, Damaged):
        reason = f"baseline damaged: {lookup.reason} ({lookup.path})."
        return Obstacle(
            Verdict.INVALID, reason, f"Restore it from git (git checkout -- {lookup.path}), or accept anew: {accept}"
        )
    if isinstance(lookup, OlderSchema):
        age = "older" if lookup.found < lookup.known else "newer"
        reason = (
            f"the baseline has the {age} schema {lookup.found}, this hpc-core reads {lookup.known} ({lookup.path})."
        )
        return Obstacle(
            Verdict.INCOMPATIBLE, reason, f"Accept anew: {accept}" if age == "older" else "Upgrade hpc-core."
        )
    return _of_another_case(record, lookup, accept)


def _of_another_case(record: Record, baseline: Baseline, accept: str) -> Obstacle | None:
    if baseline.case != record.case.id:
        reason = f"the baseline is of {baseline.case}, not of {record.case.id}: it was copied or renamed by hand."
        return Obstacle(Verdict.INCOMPATIBLE, reason, f"Accept anew: {accept}")
    if baseline.digest != record.case.digest:
        changes = (
            ", ".join(case_changes(baseline.spec, record.case)) or f"digest {baseline.digest} → {record.case.digest}"
        )
        reason = f"STALE: the case changed since this baseline ({changes}), accepted {baseline.accepted.at}."
        return Obstacle(Verdict.INCOMPATIBLE, reason, f"Measure and accept it on this machine again: {accept}")
    return None


def _judgement(
    record: Record, rows: tuple[MetricVerdict, ...], obstacle: Obstacle | None, moved: tuple[str, ...]
) -> Judgement:
    verdict = worst_metric(rows)
    if obstacle is not None:
        verdict = worst((verdict, obstacle.verdict))
    leading = next((row for row in rows if row.judged and row.verdict is verdict), None)
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
        remarks=_unjudged_metrics(record, rows),
    )


_WHY = {Verdict.NO_BASELINE: "new", Verdict.INCOMPATIBLE: "of another Python"}


def _unjudged_metrics(record: Record, rows: tuple[MetricVerdict, ...]) -> tuple[str, ...]:
    """Return a sentence on the metrics that the baseline does not hold yet, on those of another Python, and on those not measured."""
    names: dict[str, list[str]] = {}
    disturbed = [row.reason for row in rows if not row.judged and row.verdict is Verdict.INCONCLUSIVE]
    for row in rows:
        if not row.judged and row.verdict is not Verdict.INCONCLUSIVE:
            why = "not measured" if row.new is None else _WHY[row.verdict]
            names.setdefault(why, []).append(row.metric)
    lines = {why: f"{why}, not judged: {', '.join(each)}." for why, each in sorted(names.items())}
    step = f" To have them judged: {update_command(record.case.id)}"
    named = (line if why == "not measured" else f"{line}{step}" for why, line in lines.items())
    return (*disturbed, *named)


def _headline(rows: tuple[MetricVerdict, ...], leading: MetricVerdict) -> str:
    alike = sum(row.judged and row.verdict is leading.verdict for row in rows) - 1
    more = f" (and {alike} more {leading.verdict.value})" if alike and leading.verdict is not Verdict.PASS else ""
    if leading.limit == "none":
        return f"{leading.reason}{more}"
    if leading.change is not None:
        undecided = f", undecided: it takes {leading.settled_by}" if leading.settled_by else ""
        return f"{leading.metric} {sizes.change(leading.change, leading.unit)}, limit {leading.limit}{undecided}{more}"
    # Judged by an absolute limit alone, so there is no change to show.
    value = "" if leading.new is None else f" {sizes.quantity(leading.new, leading.unit)}"
    return f"{leading.metric}{value}, limit {leading.limit}{more}"
