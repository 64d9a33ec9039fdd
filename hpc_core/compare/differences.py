"""From the records of both sides to one row per metric: what differs, by how much, and what that means.

Exact metrics are compared exactly, from one process a side. Busy and wall time are decided by the sequential three-way rule over
pairs of processes, each process one value. Metrics without such a rule are shown and not judged.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence

import msgspec

from hpc_core.case.case import Case
from hpc_core.compare.sequential import Check, Sequential
from hpc_core.gate.comparability import incomparable
from hpc_core.gate.intervals import SPREADS, Interval, family_of
from hpc_core.gate.tolerance import PAIRED_RATIO, allowed_ratio, beyond, tolerance
from hpc_core.gate.verdict import Verdict
from hpc_core.record import units as sizes
from hpc_core.record.record import Metric, Record


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """What a run of comparisons allows, and how often it may be wrong."""

    wall: float = 0.05
    """Ratio by which wall time may differ: half of the 10 % that must be found."""
    busy: float = PAIRED_RATIO
    alpha: float = 0.05
    """Chance of a false alarm in the whole run: all timed metrics of all cases together."""
    least_pairs: int = 3
    most_pairs: int = 24

    def tolerance(self, case: Case, name: str, metric: Metric) -> float:
        """Return the allowed ratio of a timed metric: the percentage in the case's limits, else this rule's."""
        ratio = self.busy if metric.noise == "busy" else self.wall
        return allowed_ratio(name, metric, case.limits.named().get(name), ratio=ratio)

    def sequential(self, case: Case, name: str, metric: Metric, metrics_judged: int) -> Sequential:
        """Return the rule for one of so many timed metrics."""
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
    """Median over the processes; None where the side lacks it."""
    head: float | int | None
    ratio: float | None
    """head / base - 1; of timed metrics the geometric mean over the pairs."""
    interval: tuple[float, float] | None = None
    """Of timed metrics: where the ratio lies, at the level of the verdict."""
    pairs: int = 0
    """Processes per side that it rests on."""
    verdict: Verdict | None
    """None: shown and not judged."""
    differs: bool
    """Beyond noise."""
    reason: str


def is_judged_in_pairs(metric: Metric) -> bool:
    """Return whether the three-way rule decides it: a time with samples, where less is better."""
    timed = metric.noise == "busy" or (metric.noise == "wall" and metric.samples is not None)
    return timed and metric.better == "lower" and metric.value > 0


def _is_exact(metric: Metric) -> bool:
    return metric.noise == "exact" and metric.gated


def _ratio(base: float, head: float) -> float | None:
    return head / base - 1 if base else None


def exact_rows(case: Case, base: Sequence[Record], head: Sequence[Record]) -> list[Difference]:
    """Return the gated exact metrics of both sides, each of which has at least one record that is ok."""
    first, other = base[0].metrics, head[0].metrics
    names = sorted({*first, *other})
    rows = []
    for name in names:
        known = [metrics[name] for metrics in (first, other) if name in metrics]
        if not any(_is_exact(metric) for metric in known):
            continue
        if len(known) < 2:
            rows.append(_one_sided(name, known[0], in_base=name in first))
        elif (obstacle := incomparable(name, first[name], other[name])) is not None:
            rows.append(_incomparable(name, first[name], other[name], obstacle.reason))
        else:
            rows.append(_exact_row(case, name, base, head))
    return rows


def _one_sided(name: str, metric: Metric, *, in_base: bool) -> Difference:
    has, lacks = ("base", "head") if in_base else ("head", "base")
    return Difference(
        metric=name,
        unit=metric.unit,
        noise=metric.noise,
        base=metric.value if in_base else None,
        head=None if in_base else metric.value,
        ratio=None,
        pairs=1,
        verdict=Verdict.INCOMPATIBLE,
        differs=True,
        reason=f"{has} has it, {lacks} does not.",
    )


def _incomparable(name: str, base: Metric, head: Metric, reason: str) -> Difference:
    return Difference(
        metric=name,
        unit=head.unit,
        noise=head.noise,
        base=base.value,
        head=head.value,
        ratio=None,
        pairs=1,
        verdict=Verdict.INCOMPATIBLE,
        differs=True,
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
    allowed = tolerance(name, metric, case.limits.named().get(name), ratio=0.0)
    verdict = beyond(metric, new, allowed)
    size = sizes.change(new - old, metric.unit)
    if unequal:
        verdict = Verdict.INCONCLUSIVE
        reason = f"not the same in each process of one side: {'; '.join(unequal)}."
    elif old == new:
        reason = "equal."
    elif verdict is Verdict.PASS:
        reason = f"{size}, within the case's limit of {allowed.text}."
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
        metric: of either side.
        base: one value per process.
        head: likewise.
        check: the last one made; None if there was none.
        ratio: by which it may differ.
        why: why there were no more pairs, if it is undecided.
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
    """Return the bounds that the verdict rests on: the wide ones for REGRESSED, the narrow ones for PASS and IMPROVED."""
    return (interval.low, interval.high) if verdict is Verdict.REGRESSED else (interval.pass_low, interval.pass_high)


def _excludes_zero(interval: Interval) -> bool:
    """Return whether the sides differ, at the run's own level of false alarms: a run of equal sides then shows nothing."""
    return interval.low > 0 or interval.high < 0


def unjudged_rows(base: Sequence[Record], head: Sequence[Record], timed: Collection[str]) -> list[Difference]:
    """Return what both sides have and no rule decides: derived numbers, memory of the process, shares of a ceiling."""
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
