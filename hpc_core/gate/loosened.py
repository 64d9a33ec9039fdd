"""What a pull request loosens: limits of cases, waivers and baselines, each with what held at the merge base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from hpc_core.baselines.baseline import Baseline, Damaged, Lookup, Missing
from hpc_core.baselines.pull_request import Loosening
from hpc_core.case.limits import Limits
from hpc_core.gate.tolerance import tolerance
from hpc_core.gate.waivers import Waiver
from hpc_core.record import units
from hpc_core.record.metrics import definition_of
from hpc_core.record.record import Metric

_NONE = "none"
_MOST_METRICS = 3


def loosened_baseline(machine: str, case: str, old: Baseline, new: Lookup) -> tuple[Loosening, ...]:
    """Return what no longer holds where a baseline is gone, accepted for a changed case, or accepted without a metric.

    A changed case is one even if none of its metrics is worse: nothing compares it with what was accepted before.
    """
    where = f"{case} on {machine}"
    if not isinstance(new, Baseline):
        now = "deleted" if isinstance(new, Missing) else "damaged" if isinstance(new, Damaged) else "of another schema"
        was = f"{units.counted(len(old.metrics), 'metric')}, accepted {old.accepted.at[:10]}: {old.accepted.reason}"
        return (Loosening(what=f"baseline of {where}", old=was, new=now),)
    worse = [name for name, metric in sorted(old.metrics.items()) if is_looser(metric, new.metrics.get(name))]
    if old.digest != new.digest:
        was, now = f"digest {old.digest}{_values(worse, old)}", f"digest {new.digest}{_values(worse, new)}"
        return (Loosening(what=f"case of {where}, accepted anew", old=was, new=now),)
    dropped = [name for name in worse if name not in new.metrics]
    return (
        (Loosening(what=f"metrics of {where}", old=_values(dropped, old).strip(" ()"), new="not accepted"),)
        if dropped
        else ()
    )


def is_looser(old: Metric, new: Metric | None) -> bool:
    """Return whether a worse value is accepted than before, or none."""
    if new is None:
        return True
    if old.unit != new.unit:
        return False
    return {"lower": new.value > old.value, "higher": new.value < old.value, "same": False}[new.better]


def _values(names: Sequence[str], baseline: Baseline) -> str:
    """Return what a baseline holds of these metrics: " (peak_bytes 1.00 GiB, flops none)"."""
    shown = [f"{name} {_value(baseline.metrics.get(name))}" for name in names[:_MOST_METRICS]]
    more = [f"and {len(names) - _MOST_METRICS} more"] if len(names) > _MOST_METRICS else []
    return f" ({', '.join([*shown, *more])})" if names else ""


def _value(metric: Metric | None) -> str:
    return _NONE if metric is None else units.quantity(metric.value, metric.unit)


def loosened_limits(case: str, old: Limits, new: Limits, accepted: Mapping[str, Metric]) -> tuple[Loosening, ...]:
    """Return the limits of a case that allow more than they did; `accepted` holds the metrics of its baseline at the merge base."""
    before, now = old.named(), new.named()
    found = []
    for name in sorted({*before, *now}):
        metric, was, is_now = accepted.get(name), before.get(name), now.get(name)
        what = f"limit on {name} of {case}"
        if metric is not None:
            allowed, allows = tolerance(name, metric, was), tolerance(name, metric, is_now)
            if allows.distance > allowed.distance:
                found.append(Loosening(what=what, old=allowed.text, new=allows.text))
        if isinstance(was, int | float) and not (
            isinstance(is_now, int | float) and not _allows_more(name, was, is_now)
        ):
            now_text = _amount(name, is_now) if isinstance(is_now, int | float) else _NONE
            found.append(Loosening(what=f"absolute {what}", old=_amount(name, was), new=now_text))
    return tuple(found)


def _allows_more(metric: str, old: float, new: float) -> bool:
    definition = definition_of(metric)
    return new < old if definition is not None and definition.better == "higher" else new > old


def _amount(metric: str, limit: float) -> str:
    definition = definition_of(metric)
    return units.quantity(limit, "1" if definition is None else definition.unit)


def loosened_waivers(old: Iterable[Waiver], new: Iterable[Waiver]) -> tuple[Loosening, ...]:
    """Return the waivers that are new, and those that allow more or hold longer than they did."""
    before = {(waiver.case, waiver.metric): waiver for waiver in old}
    found = []
    for waiver in new:
        was = before.get((waiver.case, waiver.metric))
        if was is None or waiver.expires > was.expires or waiver.allows_more_than(was):
            what = f"waiver of {waiver.metric} of {waiver.case}"
            found.append(Loosening(what=what, old=_NONE if was is None else _terms(was), new=_terms(waiver)))
    return tuple(found)


def _terms(waiver: Waiver) -> str:
    definition = definition_of(waiver.metric)
    limit = waiver.limit_text("1" if definition is None else definition.unit)
    return f"up to {limit} until {waiver.expires} by {waiver.owner} ({waiver.reason})"
