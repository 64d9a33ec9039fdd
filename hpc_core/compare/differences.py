"""From the records of both sides to one row a metric: what differs, by how much, and what that means. Pure.

Exact metrics are compared exactly, from one process a side. Busy and wall time are decided by the sequential three-way rule over
pairs of processes, each process one value. What has no such rule is shown and not judged.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence

import msgspec

from hpc_core.case.case import Case
from hpc_core.case.limits import relative_limit
from hpc_core.gate import Verdict
from hpc_core.gate.interval import Interval
from hpc_core.gate.sequential import Look, Sequential
from hpc_core.gate.spread import SPREADS, family_of
from hpc_core.record import units as sizes
from hpc_core.record.record import Metric, Record

__all__ = ["Difference", "Rule", "decided", "exact_rows", "is_judged_in_pairs", "timed_row", "unjudged_rows"]

_MUST_AGREE = ("unit", "noise", "better")


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """What a run of comparisons allows."""

    wall: float = 0.05
    """Ratio by which wall time may differ. A tenth more must be found, so the limit lies halfway."""
    busy: float = 0.005
    alpha: float = 0.05
    """Chance of a false alarm in the whole run: all timed metrics of all cases together."""
    least_pairs: int = 3
    most_pairs: int = 24

    def tolerance(self, case: Case, name: str, metric: Metric) -> float:
        """The ratio allowed: a percentage that the case's limits name, else this rule's."""
        named = relative_limit(case.limits.named().get(name))
        if named is not None:
            return named
        return self.busy if metric.noise == "busy" else self.wall

    def sequential(self, case: Case, name: str, metric: Metric, metrics_judged: int) -> Sequential:
        """The rule for one of so many timed metrics."""
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
    """Where the ratio lies, of timed metrics: at the level that the verdict was taken at."""
    pairs: int = 0
    """Processes a side that it rests on."""
    verdict: Verdict | None
    """None: shown, not judged."""
    differs: bool
    """Beyond noise."""
    reason: str


def is_judged_in_pairs(metric: Metric) -> bool:
    """Whether the three-way rule decides it: a time with samples, of which less is better."""
    timed = metric.noise == "busy" or (metric.noise == "wall" and metric.samples is not None)
    return timed and metric.better == "lower" and metric.value > 0


def _is_exact(metric: Metric) -> bool:
    return metric.noise == "exact" and metric.gated


def _ratio(base: float, head: float) -> float | None:
    return head / base - 1 if base else None


def exact_rows(case: Case, base: Sequence[Record], head: Sequence[Record]) -> list[Difference]:
    """The gated exact metrics of both sides; at least one good record each."""
    first, other = base[0].metrics, head[0].metrics
    names = sorted({*first, *other})
    rows = []
    for name in names:
        known = [metrics[name] for metrics in (first, other) if name in metrics]
        if not any(_is_exact(metric) for metric in known):
            continue
        if len(known) < 2:
            rows.append(_one_sided(name, known[0], in_base=name in first))
        elif any(getattr(first[name], field) != getattr(other[name], field) for field in _MUST_AGREE):
            rows.append(_another_quantity(name, first[name], other[name]))
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


def _another_quantity(name: str, base: Metric, head: Metric) -> Difference:
    changed = [
        f"{field} {getattr(base, field)} → {getattr(head, field)}"
        for field in _MUST_AGREE
        if getattr(base, field) != getattr(head, field)
    ]
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
        reason=f"another quantity on each side: {', '.join(changed)}.",
    )


def _values(records: Sequence[Record], name: str) -> list[float | int]:
    return [record.metrics[name].value for record in records if name in record.metrics]


def _exact_row(case: Case, name: str, base: Sequence[Record], head: Sequence[Record]) -> Difference:
    before, after = _values(base, name), _values(head, name)
    metric = base[0].metrics[name]
    old, new = before[0], after[0]
    verdict, reason = Verdict.PASS, "equal."
    restless = [
        f"{side} gave {sizes.pair(min(values), max(values), metric.unit)} in {len(values)} processes"
        for side, values in (("base", before), ("head", after))
        if len(set(values)) > 1
    ]
    if restless:
        verdict, reason = Verdict.INCONCLUSIVE, f"not the same in each process of one side: {'; '.join(restless)}."
    elif old != new:
        better = {"lower": new < old, "higher": new > old, "same": False}[metric.better]
        allowed = relative_limit(case.limits.named().get(name))
        size = sizes.change(new - old, metric.unit)
        verdict, reason = (
            (Verdict.IMPROVED if better else Verdict.REGRESSED),
            f"{size}.",
        )
        if allowed is not None and abs(new - old) <= allowed * abs(old):
            verdict, reason = Verdict.PASS, f"{size}, within the case's limit of {sizes.percent(allowed)}."
    return Difference(
        metric=name,
        unit=metric.unit,
        noise=metric.noise,
        base=old,
        head=new,
        ratio=_ratio(old, new),
        pairs=min(len(before), len(after)),
        verdict=verdict,
        differs=bool(restless) or old != new,
        reason=reason,
    )


def decided(look: Look | None) -> bool:
    """Whether no further pair is needed."""
    return look is not None and look.verdict is not None


def timed_row(
    name: str,
    metric: Metric,
    base: Sequence[float],
    head: Sequence[float],
    look: Look | None,
    tolerance: float,
    why: str,
) -> Difference:
    """A metric that pairs decide.

    Args:
        name: of the metric.
        metric: of either side.
        base: one value a process.
        head: the same.
        look: the last one taken.
        tolerance: ratio.
        why: why there were no more pairs, if it is undecided.
    """
    interval = None if look is None else look.interval
    verdict = Verdict.INCONCLUSIVE if look is None or look.verdict is None else look.verdict
    limit = f"limit {sizes.percent(tolerance)}"
    if verdict is Verdict.INCONCLUSIVE:
        reason = f"{limit}; {why}" if look is None or look.verdict is None else f"{limit}; {look.settles}"
    else:
        reason = f"{limit}, {len(base)} pairs."
    mean = statistics.geometric_mean(head) / statistics.geometric_mean(base) - 1
    return Difference(
        metric=name,
        unit=metric.unit,
        noise=metric.noise,
        base=statistics.median(base),
        head=statistics.median(head),
        ratio=mean,
        interval=None if interval is None else _shown(interval, verdict),
        pairs=len(base),
        verdict=verdict,
        differs=verdict in (Verdict.REGRESSED, Verdict.IMPROVED) or (interval is not None and _beyond_zero(interval)),
        reason=reason
        if not look or verdict is not Verdict.PASS or not _beyond_zero(interval)
        else f"differs, within the {reason}",
    )


def _shown(interval: Interval, verdict: Verdict) -> tuple[float, float]:
    """REGRESSED rests on the wide bounds, PASS and IMPROVED on the narrow ones."""
    return (interval.low, interval.high) if verdict is Verdict.REGRESSED else (interval.pass_low, interval.pass_high)


def _beyond_zero(interval: Interval | None) -> bool:
    """At the run's own level of false alarms, so that a run of equal sides shows nothing."""
    return interval is not None and (interval.low > 0 or interval.high < 0)


def unjudged_rows(base: Sequence[Record], head: Sequence[Record], timed: Collection[str]) -> list[Difference]:
    """Everything that both sides have, but what is exact or `timed`: derived numbers, memory of the process, shares of a ceiling."""
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
