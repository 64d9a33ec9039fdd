"""Judge one metric: against its absolute limit, and against its accepted value."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from hpc_core.baselines.baseline import Baseline, proves_nothing
from hpc_core.case.limits import Limit, relative_limit
from hpc_core.gate.busy import Evidence, judge_busy
from hpc_core.gate.comparability import Place, incomparable
from hpc_core.gate.intervals import Interval
from hpc_core.gate.spread import judge_spread, lacks_canary
from hpc_core.gate.tolerance import (
    Tolerance,
    allowed_ratio,
    beyond,
    ceiling_text,
    exceeds,
    strictest,
    strictest_absolute,
    tolerance,
)
from hpc_core.gate.verdict import MetricVerdict, Verdict
from hpc_core.record import units as sizes
from hpc_core.record.metrics import definition_of, is_disturbed
from hpc_core.record.record import Metric


class Context(msgspec.Struct, frozen=True, kw_only=True):
    """What is the same for every metric of a judgement."""

    case: str
    place: Place
    baseline: Baseline | None
    suspects: tuple[str, ...]
    """What moved since the baseline and can have changed the case."""
    evidence: Evidence
    limited: tuple[str, ...]
    """The metrics of this record that a case may limit."""

    @property
    def update(self) -> str:
        """The command that accepts what the case gives now."""
        return update_command(self.case)


class Obstacle(msgspec.Struct, frozen=True):
    """Why no metric of a record can be compared with its baseline, and the verdict that follows."""

    verdict: Verdict
    reason: str
    next_step: str


class _Finding(msgspec.Struct, frozen=True):
    """The result of one of the checks on a metric; the gravest becomes its verdict."""

    verdict: Verdict
    limit: str
    reason: str
    next_step: str = ""
    interval: Interval | None = None
    settled_by: str = ""
    judged: bool = True
    remark: str = ""


def place_of(baseline: Baseline) -> Place:
    """Return where a baseline was measured."""
    return Place(baseline.machine.key, baseline.stack, baseline.settings, baseline.python)


def update_command(case: str) -> str:
    """Return the command that accepts what a case gives now."""
    return f'pytest --benchmark --case {case} --perf-update --reason "…"'


def judge_metric(
    context: Context,
    name: str,
    new: Metric | None,
    shown: Metric | None,
    *,
    limits: Sequence[Limit],
    obstacle: Obstacle | None,
) -> MetricVerdict:
    """Return the verdict on one metric.

    Args:
        context: what is the same for all metrics.
        name: of the metric.
        new: its value; None if the record does not gate it.
        shown: its value, gated or not; None if the record lacks it.
        limits: of the case for this metric; None stands for the registry's tolerance. The strictest one counts.
        obstacle: why there is no comparable baseline; None if there is one.
    """
    old = None if context.baseline is None else context.baseline.metrics.get(name)
    if new is None:
        findings = [_vanished(context, name, shown, limited=any(limit is not None for limit in limits))]
    elif (text := proves_nothing(name, new)) is not None:
        findings = [_Finding(Verdict.INVALID, "none", f"{text}.", "Measure again.")]
    else:
        findings = _findings(context, name, new, old, limits, obstacle)
    gravest = max(findings, key=lambda finding: finding.verdict.severity)
    reasons = [finding.reason for finding in findings if finding.verdict is gravest.verdict]
    comparable = old is not None and new is not None and old.unit == new.unit
    difference = new.value - old.value if comparable and old is not None and new is not None else None
    known = new or old or shown
    interval = next((finding.interval for finding in findings if finding.interval is not None), None)
    return MetricVerdict(
        metric=name,
        verdict=gravest.verdict,
        old=None if old is None else old.value,
        new=None if shown is None else shown.value,
        unit="" if known is None else known.unit,
        change=difference,
        ratio=None if difference is None or old is None or not old.value else difference / old.value,
        limit=gravest.limit,
        reason=" ".join(reasons),
        next_step=gravest.next_step,
        judged=gravest.judged,
        interval=None if interval is None else (interval.low, interval.high),
        alpha=None if interval is None else interval.alpha,
        settled_by=gravest.settled_by,
        remark=gravest.remark,
    )


def _findings(
    context: Context,
    name: str,
    new: Metric,
    old: Metric | None,
    limits: Sequence[Limit],
    obstacle: Obstacle | None,
) -> list[_Finding]:
    ceiling = strictest_absolute(new, limits)
    absolute = None if ceiling is None else _absolute(name, new, ceiling)
    if obstacle is not None:
        if absolute is not None and obstacle.verdict is Verdict.NO_BASELINE:
            return [absolute]  # the case stays NO_BASELINE, but this metric was judged by a limit of its own
        found = _Finding(obstacle.verdict, "none", obstacle.reason, obstacle.next_step)
    elif old is None or context.baseline is None:
        if absolute is not None:
            return [absolute]
        found = _new(context, name, new)
    else:
        found = _against(context, context.baseline, name, new, old, limits)
    return [found] if absolute is None else [found, absolute]


def _new(context: Context, name: str, new: Metric) -> _Finding:
    """Return the finding on a metric that the baseline does not hold: accepting the case adds it."""
    value = sizes.quantity(new.value, new.unit)
    reason = f"{name} is {value}; it is new and not judged, since the baseline does not hold it yet."
    return _Finding(Verdict.NO_BASELINE, "none", reason, f"To have it judged: {context.update}", judged=False)


def _vanished(context: Context, name: str, shown: Metric | None, *, limited: bool) -> _Finding:
    state = f"the record has no {name}" if shown is None else f"{name} is shown there but not gated"
    if shown is not None and is_disturbed(shown):
        text = f"{name} is {sizes.quantity(shown.value, shown.unit)}, not judged: {shown.note}"
        return _Finding(Verdict.INCONCLUSIVE, "none", f"{text}.", "Run it on a quieter machine.", judged=limited)
    if limited and shown is None and (lack := _why_never(context.place.machine, name)):
        return _Finding(Verdict.INCOMPATIBLE, "none", f"limit on {name}, but {lack[0]}.", lack[1])
    if limited:
        step = f"Drop the limit. What this case can limit: {', '.join(context.limited)}."
        return _Finding(Verdict.INCOMPATIBLE, "none", f"limit on {name}, but {state}.", step)
    reason = f"{name} vanished: the baseline holds it, but {state}."
    definition = definition_of(name)
    # Somebody else on the GPU, or MIG, leaves a run without energy. That is no change of the case.
    judged = definition is None or definition.unit != "J" or shown is not None
    return _Finding(Verdict.INCOMPATIBLE, "none", reason, f"If that is meant: {context.update}", judged=judged)


def _why_never(machine: str, name: str) -> tuple[str, str] | None:
    """Return why a machine can never have this metric, and where a limit on it belongs."""
    definition = definition_of(name)
    if definition is None:
        return None
    if machine == "cpu" and definition.gpu_only:
        step = f"Limit {name} in a test that needs a GPU: perf(…, device='cuda') is skipped elsewhere."
        return f"only a GPU has {name}, and this ran on a CPU", step
    if machine == "predicted" and definition.noise != "exact":
        return "a prediction has no times", f"Limit {name} where the case runs on a GPU."
    return None


def _absolute(name: str, new: Metric, limit: float) -> _Finding:
    text = ceiling_text(new, limit)
    value = sizes.quantity(new.value, new.unit)
    if not exceeds(new, limit):
        return _Finding(Verdict.PASS, text, f"{name} is {value}, allowed is {text}.")
    over = sizes.change(new.value - limit, new.unit)
    reason = f"{name} is {value}, allowed is {text} ({over}){'' if new.note is None else f': {new.note}'}."
    return _Finding(Verdict.REGRESSED, text, reason, f"Get it back within the limit, or raise Limits({name}=…).")


def _against(
    context: Context, baseline: Baseline, name: str, new: Metric, old: Metric, limits: Sequence[Limit]
) -> _Finding:
    """Compare with the accepted value, if the two can be compared."""
    accept = f"Accept anew: {context.update}"
    unlike = incomparable(name, old, new, (place_of(baseline), context.place))
    if unlike is not None and unlike.verdict is Verdict.INCOMPATIBLE:
        return _Finding(unlike.verdict, "none", unlike.reason, accept, judged=unlike.judged)
    if (text := proves_nothing(name, old)) is not None:
        return _Finding(Verdict.INVALID, "none", f"in the baseline, {text}.", accept)
    if unlike is not None:
        return _Finding(unlike.verdict, "none", unlike.reason, accept)
    return _compared(context, baseline, name, new, old, strictest(name, old, limits))


def _compared(context: Context, baseline: Baseline, name: str, new: Metric, old: Metric, limit: Limit) -> _Finding:
    allowed = tolerance(name, old, limit)
    difference = new.value - old.value
    size = sizes.change(difference, new.unit)
    relative = f", {sizes.percent(difference / old.value)}" if old.value and difference else ""
    reason = f"{name} {sizes.pair(old.value, new.value, new.unit)} ({size}{relative}), limit {allowed.text}"
    if new.noise == "busy":
        ratio = allowed_ratio(name, old, limit)
        found = _busy(context, name, new, old, allowed, ratio, reason)
    elif (
        new.noise == "wall"
        and new.unit == "s"
        and relative_limit(limit) is None
        and lacks_canary(name, context.evidence)
    ):
        text = f"{reason.rpartition(', limit ')[0]}, not judged: no accepted session holds its canary."
        return _Finding(Verdict.NO_BASELINE, "none", text, f"To have it judged: {context.update}", judged=False)
    elif new.noise == "wall":
        stated = relative_limit(limit) is not None
        ratio = allowed_ratio(name, old, limit)
        judged = judge_spread(name, new, old, ratio, context.evidence, stated=stated)
        reason = f"{name} {sizes.pair(old.value, new.value, new.unit)} ({size}{relative}), limit {judged.limit}"
        step = f"To settle it: {judged.settled_by}." if judged.settled_by else ""
        step = "Measure again." if judged.verdict is Verdict.INVALID else step
        found = _Finding(
            judged.verdict,
            judged.limit,
            reason + judged.text,
            step,
            judged.interval,
            judged.settled_by,
            remark=judged.remark and f"{name} {judged.remark}",
        )
    else:
        found = _Finding(beyond(old, new.value, allowed), allowed.text, f"{reason}.")
    if found.verdict is Verdict.IMPROVED:
        return msgspec.structs.replace(found, next_step=f"Keep the gain: {context.update}")
    if found.verdict is not Verdict.REGRESSED:
        return found
    moved = context.suspects if "stack" in new.depends_on else ()
    suspects = f" Moved since the baseline: {', '.join(moved)}." if moved else ""
    step = f"Find the cause; if it is meant: {context.update}"
    return msgspec.structs.replace(found, reason=found.reason + suspects, next_step=step)


def _busy(
    context: Context, name: str, new: Metric, old: Metric, allowed: Tolerance, ratio: float, reason: str
) -> _Finding:
    found = judge_busy(name, new, old, ratio, context.evidence)
    step = "Measure again." if found.verdict is Verdict.INVALID else ""
    if found.verdict is Verdict.INCONCLUSIVE:
        step = f"To settle it: {found.settled_by}." if found.settled_by else "Measure again under like conditions."
    return _Finding(found.verdict, allowed.text, reason + found.text, step, found.interval, found.settled_by)
