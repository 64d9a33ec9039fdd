"""From the records of both sides to one row per metric: whether it differs, by how much, and the verdict.

Exact metrics are compared exactly, from one process per side. Busy and wall time are decided by the sequential three-way rule over
pairs of processes, with one value per process. Other metrics are shown and not judged.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence

import msgspec

from hpc_core.case.case import Case
from hpc_core.compare.sequential import Check, Sequential
from hpc_core.gate.comparability import incomparable, other_python
from hpc_core.gate.intervals import SPREADS, Interval, family_of
from hpc_core.gate.tolerance import PAIRED_RATIO, allowed_ratio, beyond, tolerance
from hpc_core.gate.verdict import Verdict
from hpc_core.record import units as sizes
from hpc_core.record.record import Metric, Record


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """The tolerances of a comparison, and its rate of false alarms."""

    wall: float = 0.05
    """The ratio by which wall time may differ: half of the 10 % that a comparison must find."""
    busy: float = PAIRED_RATIO
    alpha: float = 0.05
    """The probability of a false alarm in the whole run, over all timed metrics of all cases."""
    least_pairs: int = 3
    most_pairs: int = 24

    def tolerance(self, case: Case, name: str, metric: Metric) -> float:
        """Return the allowed ratio of a timed metric: the percentage in the case's limits, else this rule's."""
        ratio = self.busy if metric.noise == "busy" else self.wall
        return allowed_ratio(name, metric, case.limits.named().get(name), ratio=ratio)

    def sequential(self, case: Case, name: str, metric: Metric, metrics_judged: int) -> Sequential:
        """Return the rule for one of `metrics_judged` timed metrics."""
        return Sequential(
            alpha=self.alpha / max(1, metrics_judged),
            tolerance=self.tolerance(case, name, metric),
            least_pairs=self.least_pairs,
            most_pairs=self.most_pairs,
            better=metric.better,
            spread=SPREADS[family_of(name)] if metric.noise == "busy" else None,
        )


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """One metric of one case on both sides."""

    metric: str
    unit: str
    noise: str
    base: float | int | None
    """The median over the processes; None if the side lacks the metric."""
    head: float | int | None
    ratio: float | None
    """head / base - 1; for timed metrics, from geometric means over the pairs."""
    interval: tuple[float, float] | None = None
    """The interval of a timed metric's ratio, at the alpha of its verdict."""
    pairs: int = 0
    """The number of processes per side."""
    verdict: Verdict | None
    """None if the metric is shown and not judged."""
    differs: bool
    """Whether the sides differ beyond noise."""
    reason: str


def is_judged_in_pairs(metric: Metric) -> bool:
    """Return whether the three-way rule decides the metric: a time with samples, where lower is better."""
    timed = metric.noise == "busy" or (metric.noise == "wall" and metric.unit == "s" and metric.samples is not None)
    return timed and metric.better == "lower" and metric.value > 0


def _is_exact(metric: Metric) -> bool:
    return metric.noise == "exact" and metric.gated


def _ratio(base: float, head: float) -> float | None:
    return head / base - 1 if base else None


def exact_rows(case: Case, base: Sequence[Record], head: Sequence[Record]) -> list[Difference]:
    """Return the rows of gated exact metrics. Each side has at least one record that is ok."""
    first, other = base[0].metrics, head[0].metrics
    names = sorted({*first, *other})
    rows = []
    for name in names:
        before, after = first.get(name), other.get(name)
        if not any(metric is not None and _is_exact(metric) for metric in (before, after)):
            continue
        if before is None or after is None:
            reason = "head has it, base does not." if before is None else "base has it, head does not."
            rows.append(_incomparable(name, before, after, reason))
        elif (text := other_python(after, *(side[0].circumstances.python for side in (base, head)))) is not None:
            rows.append(_incomparable(name, before, after, f"{text}.", judged=False))
        elif (obstacle := incomparable(name, before, after)) is not None:
            rows.append(_incomparable(name, before, after, obstacle.reason))
        else:
            rows.append(_exact_row(case, name, base, head))
    return rows


def _incomparable(
    name: str, base: Metric | None, head: Metric | None, reason: str, *, judged: bool = True
) -> Difference:
    metric = base if head is None else head
    assert metric is not None
    return Difference(
        metric=name,
        unit=metric.unit,
        noise=metric.noise,
        base=None if base is None else base.value,
        head=None if head is None else head.value,
        ratio=None,
        pairs=1,
        verdict=Verdict.INCOMPATIBLE if judged else None,
        differs=judged,
        reason=reason,
    )


def _values(records: Sequence[Record], name: str) -> list[float | int]:
    return [record.metrics[name].value for record in records if name in record.metrics]


def _exact_row(case: Case, name: str, base: Sequence[Record], head: Sequence[Record]) -> Difference:
    before, after = _values(base, name), _values(head, name)
    metric = base[0].metrics[name]
    old, new = before[0], after[0]
    unequal = [
        f"{side} gave {sizes.pair(min(values), max(values), metric.unit)} in {len(values)} processes"
        for side, values in (("base", before), ("head", after))
        if len(set(values)) > 1
    ]
    # Every release executes a few bytecodes more or less, so the registry's tolerance holds for them.
    ratio = None if "python" in metric.depends_on else 0.0
    allowed = tolerance(name, metric, case.limits.named().get(name), ratio=ratio)
    verdict = beyond(metric, new, allowed)
    size = sizes.change(new - old, metric.unit)
    if unequal:
        verdict = Verdict.INCONCLUSIVE
        reason = f"not the same in each process of one side: {'; '.join(unequal)}."
    elif old == new:
        reason = "equal."
    elif verdict is Verdict.PASS:
        reason = f"{size}, within the limit of {allowed.text}."
    else:
        reason = f"{size}."
    return Difference(
        metric=name,
        unit=metric.unit,
        noise=metric.noise,
        base=old,
        head=new,
        ratio=_ratio(old, new),
        pairs=min(len(before), len(after)),
        verdict=verdict,
        differs=bool(unequal) or old != new,
        reason=reason,
    )


def decided(check: Check | None) -> bool:
    """Return whether no further pair is needed."""
    return check is not None and check.verdict is not None


def timed_row(
    name: str,
    metric: Metric,
    base: Sequence[float],
    head: Sequence[float],
    check: Check | None,
    ratio: float,
    why: str,
) -> Difference:
    """Return the row of a metric that pairs decide.

    Args:
        name: of the metric.
        metric: the metric on either side.
        base: one value per process.
        head: likewise.
        check: the last check; None if there was none.
        ratio: the allowed ratio.
        why: why there were no more pairs, if the metric is undecided.
    """
    interval = None if check is None else check.interval
    outside = interval is not None and _excludes_zero(interval)
    limit = f"limit {sizes.percent(ratio)}"
    if check is None or check.verdict is None:
        verdict, reason = Verdict.INCONCLUSIVE, f"{limit}; {why}"
    elif check.verdict is Verdict.INCONCLUSIVE:
        verdict, reason = Verdict.INCONCLUSIVE, f"{limit}; {check.required}"
    else:
        verdict, reason = check.verdict, f"{limit}, {len(base)} pairs."
    if verdict is Verdict.PASS and outside:
        reason = f"differs, within the {reason}"
    return Difference(
        metric=name,
        unit=metric.unit,
        noise=metric.noise,
        base=statistics.median(base),
        head=statistics.median(head),
        ratio=statistics.geometric_mean(head) / statistics.geometric_mean(base) - 1,
        interval=None if interval is None else _shown(interval, verdict),
        pairs=len(base),
        verdict=verdict,
        differs=verdict in (Verdict.REGRESSED, Verdict.IMPROVED) or outside,
        reason=reason,
    )


def _shown(interval: Interval, verdict: Verdict) -> tuple[float, float]:
    """Return the bounds that the verdict used: the wide ones for REGRESSED, the narrow ones for PASS and IMPROVED."""
    return (interval.low, interval.high) if verdict is Verdict.REGRESSED else (interval.pass_low, interval.pass_high)


def _excludes_zero(interval: Interval) -> bool:
    """Return whether the sides differ, at the run's alpha: a run of equal sides then shows no difference."""
    return interval.low > 0 or interval.high < 0


def unjudged_rows(base: Sequence[Record], head: Sequence[Record], timed: Collection[str]) -> list[Difference]:
    """Return the rows that no rule decides: derived numbers, memory of the process, shares of a ceiling."""
    rows = []
    first, other = base[0].metrics, head[0].metrics
    for name in sorted(first.keys() & other.keys()):
        metric = first[name]
        if name in timed or _is_exact(metric) or _is_exact(other[name]):
            continue
        before, after = _values(base, name), _values(head, name)
        old, new = statistics.median(before), statistics.median(after)
        rows.append(
            Difference(
                metric=name,
                unit=metric.unit,
                noise=metric.noise,
                base=old,
                head=new,
                ratio=_ratio(old, new),
                pairs=min(len(before), len(after)),
                verdict=None,
                differs=False,
                reason="shown, not judged.",
            )
        )
    return rows
