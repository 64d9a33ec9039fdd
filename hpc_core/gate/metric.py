"""Judge one metric: against its absolute limit, and against its accepted value. Knows no other metric of the case."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from hpc_core.baselines.baseline import Baseline, proves_nothing
from hpc_core.case.limits import Limit
from hpc_core.gate.busy import Evidence, judge_busy
from hpc_core.gate.interval import Interval
from hpc_core.gate.moved import packages_moved, time_incomparable
from hpc_core.gate.spread import family_of
from hpc_core.gate.tolerance import Tolerance, beyond, ceiling_text, exceeds, tolerance
from hpc_core.gate.verdict import MetricVerdict, Verdict
from hpc_core.record import units as sizes
from hpc_core.record.record import Metric

__all__ = ["Bench", "judge_metric", "update_command"]

_ONLY_ON_A_GPU = ("busy_", "kernels", "copies", "memsets", "synchronizations")
_MUST_AGREE = ("unit", "noise", "better", "depends_on")


class Bench(msgspec.Struct, frozen=True, kw_only=True):
    """What is the same for every metric of a judgement."""

    case: str
    machine: str
    stack: Mapping[str, str]
    baseline: Baseline | None
    evidence: Evidence


class _Finding(msgspec.Struct, frozen=True):
    """One of the checks that a metric goes through; the gravest becomes its verdict."""

    verdict: Verdict
    limit: str
    reason: str
    next_step: str = ""
    interval: Interval | None = None
    settled_by: str = ""


def update_command(case: str) -> str:
    """The command that accepts what a case gives now."""
    return f'pytest --benchmark --case {case} --perf-update --reason "…"'


def judge_metric(
    bench: Bench,
    name: str,
    new: Metric | None,
    shown: Metric | None,
    *,
    limit: Limit,
    without: tuple[Verdict, str, str] | None,
) -> MetricVerdict:
    """The verdict on one metric.

    `new` is None if the record does not gate it, `shown` if the record lacks it. `without` is the verdict, reason and
    next step that hold for all metrics if there is no comparable baseline.
    """
    old = None if bench.baseline is None else bench.baseline.metrics.get(name)
    if new is None:
        findings = [_vanished(bench, name, shown, limited=limit is not None)]
    elif (text := proves_nothing(name, new)) is not None:
        findings = [_Finding(Verdict.INVALID, "none", f"{text}.", "Measure again.")]
    else:
        findings = _findings(bench, name, new, old, limit, without)
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
        interval=None if interval is None else (interval.low, interval.high),
        alpha=None if interval is None else interval.alpha,
        settled_by=gravest.settled_by,
    )


def _findings(
    bench: Bench,
    name: str,
    new: Metric,
    old: Metric | None,
    limit: Limit,
    without: tuple[Verdict, str, str] | None,
) -> list[_Finding]:
    findings = []
    absolute = None if limit is None or isinstance(limit, str) else _absolute(name, new, limit)
    if without is not None:
        verdict, reason, step = without
        findings.append(_Finding(verdict, "none", reason, step))
        if absolute is not None and verdict is Verdict.NO_BASELINE:
            return [absolute]  # the case stays NO_BASELINE, but this metric has a limit of its own and was judged by it
    elif old is None or bench.baseline is None:
        reason = f"{name} is {sizes.quantity(new.value, new.unit)}; the baseline does not hold it."
        findings.append(_Finding(Verdict.NO_BASELINE, "none", reason, update_command(bench.case)))
    else:
        findings.append(_against(bench, bench.baseline, name, new, old, limit))
    return findings if absolute is None else [*findings, absolute]


def _vanished(bench: Bench, name: str, shown: Metric | None, *, limited: bool) -> _Finding:
    state = f"the record has no {name}" if shown is None else f"{name} is shown there but not gated"
    if limited and shown is None and (lack := _what_it_takes(bench.machine, name)):
        return _Finding(Verdict.INCOMPATIBLE, "none", f"limit on {name}, but {lack[0]}.", lack[1])
    if limited:
        return _Finding(
            Verdict.INCOMPATIBLE, "none", f"limit on {name}, but {state}.", "Drop the limit, or measure it."
        )
    reason = f"{name} vanished: the baseline holds it, but {state}."
    return _Finding(Verdict.INCOMPATIBLE, "none", reason, f"If that is meant: {update_command(bench.case)}")


def _what_it_takes(machine: str, name: str) -> tuple[str, str] | None:
    """Why a machine can never have this metric, and where a limit on it belongs."""
    if machine == "cpu" and name.startswith(_ONLY_ON_A_GPU):
        step = f"Limit {name} in a test that needs a GPU: perf(…, device='cuda') is skipped elsewhere."
        return f"only a GPU has {name}, and this ran on a CPU", step
    if machine == "predicted" and name.startswith("busy_"):
        return "a prediction has no times", f"Limit {name} where the case runs on a GPU."
    return None


def _absolute(name: str, new: Metric, limit: float) -> _Finding:
    text = ceiling_text(new, limit)
    value = sizes.quantity(new.value, new.unit)
    if not exceeds(new, limit):
        return _Finding(Verdict.PASS, text, f"{name} is {value}, allowed is {text}.")
    over = sizes.change(new.value - limit, new.unit)
    reason = f"{name} is {value}, allowed is {text} ({over})."
    return _Finding(Verdict.REGRESSED, text, reason, f"Get it back within the limit, or raise Limits({name}=…).")


def _against(bench: Bench, baseline: Baseline, name: str, new: Metric, old: Metric, limit: Limit) -> _Finding:
    """Compare with the accepted value, if the two can be compared at all."""
    accept = f"Accept anew: {update_command(bench.case)}"
    differing = [field for field in _MUST_AGREE if getattr(old, field) != getattr(new, field)]
    if differing:
        pairs = ", ".join(f"{field} {getattr(old, field)} → {getattr(new, field)}" for field in differing)
        return _Finding(Verdict.INCOMPATIBLE, "none", f"{name} is another quantity than accepted: {pairs}.", accept)
    if "machine" in new.depends_on and baseline.machine.key != bench.machine:
        reason = f"{name} depends on the machine; the baseline is of {baseline.machine.key}, this is {bench.machine}."
        return _Finding(Verdict.INCOMPATIBLE, "none", reason, accept)
    if (text := proves_nothing(name, old)) is not None:
        return _Finding(Verdict.INVALID, "none", f"in the baseline, {text}.", accept)
    below = time_incomparable(baseline.stack, bench.stack) if new.noise == "busy" else ()
    if below:
        reason = f"{name} {sizes.pair(old.value, new.value, new.unit)}, but no time compares across {', '.join(below)}."
        return _Finding(Verdict.INCONCLUSIVE, "none", reason, accept)
    return _compared(bench, baseline, name, new, old, limit)


def _compared(bench: Bench, baseline: Baseline, name: str, new: Metric, old: Metric, limit: Limit) -> _Finding:
    allowed = tolerance(old, limit, family_of(name))
    difference = new.value - old.value
    size = sizes.change(difference, new.unit)
    relative = f", {sizes.percent(difference / old.value)}" if old.value and difference else ""
    reason = f"{name} {sizes.pair(old.value, new.value, new.unit)} ({size}{relative}), limit {allowed.text}"
    if new.noise == "busy":
        found = _busy(bench, name, new, old, allowed, reason)
    else:
        found = _Finding(beyond(old, new.value, allowed), allowed.text, f"{reason}.")
    if found.verdict is Verdict.IMPROVED:
        return msgspec.structs.replace(found, next_step=f"Keep the gain: {update_command(bench.case)}")
    if found.verdict is not Verdict.REGRESSED:
        return found
    moved = packages_moved(baseline.stack, bench.stack) if "stack" in new.depends_on else ()
    suspects = f" Moved since the baseline: {', '.join(moved)}." if moved else ""
    step = f"Find the cause; if it is meant: {update_command(bench.case)}"
    return msgspec.structs.replace(found, reason=found.reason + suspects, next_step=step)


def _busy(bench: Bench, name: str, new: Metric, old: Metric, allowed: Tolerance, reason: str) -> _Finding:
    seen = judge_busy(name, new, old, allowed.distance / abs(old.value), bench.evidence)
    step = "Measure again." if seen.verdict is Verdict.INVALID else ""
    if seen.verdict is Verdict.INCONCLUSIVE:
        step = f"To settle it: {seen.settled_by}." if seen.settled_by else "Measure again under like conditions."
    return _Finding(seen.verdict, allowed.text, reason + seen.text, step, seen.interval, seen.settled_by)
