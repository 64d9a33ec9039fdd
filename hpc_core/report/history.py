"""A metric over sessions, as text and as JSON: values, change points, and which packages moved there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from hpc_core.baselines.over_time import Point
from hpc_core.case.errors import SpecError
from hpc_core.gate.change_points import ALPHA, ChangePoint, exact_changes, least_points, noisy_changes
from hpc_core.gate.comparability import Place
from hpc_core.gate.suspects import suspects
from hpc_core.record import units

_SHOWN_PACKAGES = 4


class Series(msgspec.Struct, frozen=True, kw_only=True):
    """One metric of a case over its points."""

    metric: str
    unit: str
    noise: str
    points: tuple[Point, ...]
    """The points that hold the metric."""
    changes: tuple[ChangePoint, ...]
    silence: str = ""
    """Why no change point can be found, if there are too few points."""

    @property
    def values(self) -> tuple[float, ...]:
        """Return one value for each session; for GPU-busy time the median of its processes."""
        return tuple(point.metrics[self.metric].value for point in self.points)


def series(points: Sequence[Point], metric: str) -> Series:
    """Return the metric over the points that hold it in the unit and noise class of the newest.

    Raises:
        SpecError: no point holds it; the message lists the metrics that exist.
    """
    holding = [point for point in points if metric in point.metrics]
    if not holding:
        names = sorted({name for point in points for name in point.metrics})
        raise SpecError(f"no metric is called {metric!r} here. There are: {', '.join(names)}.")
    newest = holding[-1].metrics[metric]
    alike = tuple(
        point
        for point in holding
        if (point.metrics[metric].unit, point.metrics[metric].noise) == (newest.unit, newest.noise)
    )
    values = [point.metrics[metric].value for point in alike]
    exact = newest.noise == "exact"
    least = 2 if exact else least_points()
    silence = ""
    if len(alike) < least:
        why = (
            "a change takes two"
            if exact
            else f"no order of them would be rarer than {ALPHA:.0%} by chance; {least} are needed"
        )
        silence = f"{units.counted(len(alike), 'session')} cannot show a change: {why}"
    changes = exact_changes(values) if exact else noisy_changes(values)
    return Series(metric=metric, unit=newest.unit, noise=newest.noise, points=alike, changes=changes, silence=silence)


def overview(points: Sequence[Point]) -> list[str]:
    """Return one line for each gated metric: first and last value, and how often it changed."""
    names = sorted({name for point in points for name, metric in point.metrics.items() if metric.gated})
    found = [series(points, name) for name in names]
    width = max((len(name) for name in names), default=0)
    return [f"{each.metric:<{width}}  {_ends(each)}  {summary(each)}" for each in found]


def _ends(each: Series) -> str:
    first, last = each.values[0], each.values[-1]
    if first == last:
        return units.quantity(last, each.unit)
    ratio = f" ({units.percent(last / first - 1)})" if first else ""
    return f"{units.pair(first, last, each.unit)}{ratio}"


def summary(each: Series) -> str:
    """Return such as "[12 sessions: 1 change, last 2026-11-24]"."""
    if each.silence:
        return f"[{each.silence}]"
    many = len(each.changes)
    shown = (
        "no change"
        if not many
        else f"{units.counted(many, 'change')}, last {each.points[each.changes[-1].index].at[:10]}"
    )
    return f"[{units.counted(len(each.points), 'session')}: {shown}]"


def lines(each: Series) -> list[str]:
    """Return one line for each point, change points marked with what moved there, then what could not be decided."""
    starts = {change.index: change for change in each.changes}
    shown = ["  when              commit      from      value"]
    for index, (point, value) in enumerate(zip(each.points, each.values, strict=True)):
        change = starts.get(index)
        mark = "*" if change is not None else " "
        spread = _spread(point, each.metric, each.unit)
        shown.append(
            f"{mark} {point.at[:16].replace('T', ' ')}  {(point.commit or 'unknown')[:10]:<10}  {point.source:<8}  "
            f"{units.quantity(value, each.unit)}{spread}"
        )
        if change is not None:
            shown.append(f"    {change_text(each, change)}")
    if each.silence:
        shown.append(f"{each.silence}.")
    elif not each.changes:
        shown.append("No change point.")
    if each.noise != "exact" and not each.silence:
        shown.append(f"A metric that never moved shows a change point here with a chance of {ALPHA:.0%}.")
    return shown


def _spread(point: Point, metric: str, unit: str) -> str:
    samples = point.metrics[metric].samples or ()
    if len(samples) < 2:
        return ""
    return f"  ({len(samples)} samples, {units.quantity(min(samples), unit)} to {units.quantity(max(samples), unit)})"


def change_text(each: Series, change: ChangePoint) -> str:
    """Return such as "+10 % (250.00 ms → 275.00 ms), p 0.004; since commit 0123abc; moved: torch 2.11.0 → 2.12.0"."""
    ratio = f"{units.percent(change.after / change.before - 1)} " if change.before else ""
    certain = "" if change.p is None else f", p {change.p:.2g}"
    was, now = each.points[change.index - 1], each.points[change.index]
    moved = suspects(now.case, *(Place(each.machine, each.stack, each.settings) for each in (was, now)))
    more = f" and {len(moved) - _SHOWN_PACKAGES} more" if len(moved) > _SHOWN_PACKAGES else ""
    packages = f"; moved: {', '.join(moved[:_SHOWN_PACKAGES])}{more}" if moved else ""
    commits = f"; commits {was.commit[:10]}..{now.commit[:10]}" if was.commit and now.commit else ""
    return f"{ratio}({units.pair(change.before, change.after, each.unit)}){certain}{commits}{packages}"


def as_json(case_id: str, key: str, found: Sequence[Series], notes: Sequence[str]) -> dict[str, Any]:
    """Return everything that the text says, as plain values."""
    return {
        "case": case_id,
        "machine": key,
        "notes": list(notes),
        "metrics": {
            each.metric: {
                "unit": each.unit,
                "noise": each.noise,
                "points": [
                    {
                        "at": point.at,
                        "commit": point.commit,
                        "source": point.source,
                        "value": value,
                        "samples": list(point.metrics[each.metric].samples or ()),
                        "stack": point.stack,
                    }
                    for point, value in zip(each.points, each.values, strict=True)
                ],
                "changes": msgspec.to_builtins(each.changes),
                "silence": each.silence,
            }
            for each in found
        },
    }
