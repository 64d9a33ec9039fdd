"""The pictures of one machine as the page's template takes them: bars, speed against memory, roofline, trends, memory over a step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from hpc_core.baselines.reading import plain
from hpc_core.bounds.reading import flops_text
from hpc_core.record import units as sizes
from hpc_core.record.record import MemoryTimeline, Record
from hpc_core.report.entry import BUSY, WALL, Entry
from hpc_core.report.memory_unit import memory_unit, peak_unit
from hpc_core.report.page.bars import CATEGORIES, categories, multiples
from hpc_core.report.page.cases import anchor
from hpc_core.report.page.charts import BROAD, Mark, placed
from hpc_core.report.page.scales import Axis, linear, log
from hpc_core.report.roofline import RoofPoint, newest_roofs, points_of
from hpc_core.report.terminal import caption
from hpc_core.report.tradeoff import comparable, front, speed_of

__all__ = ["machines_of"]

_MOST_MACHINES = 8
_MOST_CHARTS = 6
_MOST_POINTS = 120
_MOST_TRENDS = 40
_MOST_SESSIONS = 60
_MOST_TIMELINES = 8
_MOST_EVENTS = 160
_LATE = 520
"""From here on a phase's name would run out of the picture, which is 600 units wide."""
_WORTH_SAYING = 1e-4
_KINDS = {"q-none": "unquantized", "q-nf4": "NF4", "q-fp4": "FP4", "q-int8": "int8"}
_WORKS = {"w-step": "step", "w-prefill": "prefill", "w-decode": "decoded token"}
"""What a mark's colour means, by its class; a legend names those that are there."""
_WORTH_A_COLOUR = 5e-4
"""What the gate allows exact bytes to move."""


def machines_of(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """A part of the page a machine, predictions last."""
    keys = dict.fromkeys(entry.machine for entry in sorted(entries, key=lambda each: (each.is_predicted, each.machine)))
    found = []
    for number, key in enumerate(list(keys)[:_MOST_MACHINES]):
        own = [entry for entry in entries if entry.machine == key]
        captions = list(dict.fromkeys(plain(caption(entry.record), 600) for entry in own))
        found.append(
            {
                "id": f"m{number}",
                "key": key,
                "name": plain(own[0].record.circumstances.machine.name, 80),
                "is_predicted": own[0].is_predicted,
                "count": len(own),
                "captions": captions[:3],
                "more_captions": max(0, len(captions) - 3),
                "blocks": multiples(own),
                "tradeoffs": tradeoffs(own),
                "roofline": roofline(own),
                "categories": categories(own),
                "trends": trends(own),
                "timelines": timelines(own),
            }
        )
    return found


def tradeoffs(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Speed against memory for each model and kind of work with at least two cases."""
    found = []
    for (_, shape, kind), group in comparable(entries).items():
        chosen = [(entry, speed) for entry in group if (speed := speed_of(entry)) is not None][:_MOST_POINTS]
        if len(chosen) < 2:
            continue
        size, unit = peak_unit(entry for entry, _ in chosen)
        points = [((entry.value("peak_bytes") or 0.0) / size, speed) for entry, speed in chosen]
        best = front(points)
        marks = [
            Mark(
                x_value=x,
                y_value=y,
                label=entry.case.partition("/")[2][:40],
                title=f"{entry.case}: {x:.2f} {unit}, {y:,.4g} tokens/s",
                anchor=anchor(entry),
                kind=_quantized(entry),
                is_strong=index in best,
            )
            for index, ((entry, _), (x, y)) in enumerate(zip(chosen, points, strict=True))
        ]
        x, y = linear([x for x, _ in points]), log([y for _, y in points])
        steps = _stairs([points[index] for index in best], x.high)
        what = "new tokens" if kind == "generate" else "tokens"
        found.append(
            placed(marks, x, y, [steps])
            | {
                "title": f"{shape}, {kind}",
                "x_label": f"peak memory, {unit}",
                "y_label": f"{what} a second (log)",
                "kinds": [(name, said) for name, said in _KINDS.items() if any(mark.kind == name for mark in marks)],
            }
        )
    return found[:_MOST_CHARTS]


def _quantized(entry: Entry) -> str:
    quantization = entry.record.case.quantization
    return "q-none" if quantization is None else f"q-{quantization.kind}"


def _stairs(points: Sequence[tuple[float, float]], end: float) -> list[tuple[float, float]]:
    """The edge of what is beaten: flat until the next case of the front costs more and gives more."""
    line = [points[0]]
    for (_, y), (x, further) in itertools.pairwise(points):
        line += [(x, y), (x, further)]
    return [*line, (end, points[-1][1])]


def roofline(entries: Sequence[Entry]) -> dict[str, Any] | None:
    """Every case with a closed form under the roofs of its newest session; None where there is none."""
    points = points_of(entries)[:_MOST_POINTS]
    if not points:
        return None
    roofs = newest_roofs(entries)
    marks = [_roof_mark(point) for point in points]
    ridges = [roof.flop_per_s / roof.bytes_per_s for roof in roofs]
    x = log([*(point.intensity for point in points), *ridges])
    y = log([point.flop_per_s / 1e12 for point in points] + [roof.flop_per_s / 1e12 for roof in roofs])
    lines = []
    for roof, ridge in zip(roofs, ridges, strict=True):
        start = max(x.low, y.low * 1e12 / roof.bytes_per_s)
        lines.append(
            [
                (start, start * roof.bytes_per_s / 1e12),
                (ridge, roof.flop_per_s / 1e12),
                (x.high, roof.flop_per_s / 1e12),
            ]
        )
    chart = placed(marks, x, y, lines, BROAD)
    chart["kinds"] = [(name, said) for name, said in _WORKS.items() if any(mark.kind == name for mark in marks)]
    chart["roofs"] = [
        {
            "name": f"{roof.name}: {flops_text(roof.flop_per_s)}, {roof.bytes_per_s / 1e12:.2f} TB/s",
            "is_measured": roof.is_measured,
            "line": line,
        }
        for roof, line in zip(roofs, chart["lines"], strict=True)
    ]
    return chart | {"x_label": "FLOP a byte, at least (log)", "y_label": "TFLOP/s (log)"}


def _roof_mark(point: RoofPoint) -> Mark:
    by = "GPU-busy" if point.is_busy else "wall"
    return Mark(
        x_value=point.intensity,
        y_value=point.flop_per_s / 1e12,
        label=point.entry.case.partition("/")[2][:40],
        title=f"{point.entry.case}, {point.work}: {flops_text(point.flop_per_s)} of {by} time at {point.intensity:,.4g} FLOP a byte",
        anchor=anchor(point.entry),
        kind=f"w-{point.work}",
    )


def trends(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Peak, busy and wall time over the sessions of each case that has several."""
    found = []
    for entry in entries:
        if len(entry.past) < 2 or not entry.metrics:
            continue
        names = [entry.name_of("peak_bytes"), entry.name_of(*BUSY), entry.name_of(*WALL)]
        lines = [line for name in names if name and (line := _line(name, entry.past[-_MOST_SESSIONS:]))]
        if lines:
            found.append({"case": entry.case, "anchor": anchor(entry), "sessions": len(entry.past), "lines": lines})
    return found[:_MOST_TRENDS]


def _line(name: str, records: Sequence[Record]) -> dict[str, Any] | None:
    """A line of one metric, on a scale that shows at least 10 % of its value, so that noise looks like noise."""
    metrics = [record.metrics[name] for record in records if name in record.metrics]
    values = [float(metric.value) for metric in metrics]
    if len(values) < 2 or len({metric.unit for metric in metrics}) > 1:
        return None
    low, high = min(values), max(values)
    middle, half = (low + high) / 2, max((high - low) / 2, 0.05 * abs(high)) or 1.0
    if not math.isfinite(middle) or not math.isfinite(half):
        return None
    step = 100 / (len(values) - 1)
    points = [
        (round(index * step, 1), round(15 - 12 * (value - middle) / half, 1)) for index, value in enumerate(values)
    ]
    first, last, unit = values[0], values[-1], metrics[-1].unit
    moved = metrics[-1].noise == "exact" and bool(first) and abs(last / first - 1) > _WORTH_A_COLOUR
    return {
        "metric": name,
        "points": points,
        "path": " ".join(f"{x},{y}" for x, y in points),
        "text": sizes.quantity(last, unit),
        "change": _since(first, last),
        "moved": moved,
    }


def _since(first: float, last: float) -> str:
    if not first or last == first:
        return "="
    ratio = last / first - 1
    return sizes.percent(ratio) if abs(ratio) >= _WORTH_SAYING else f"within {100 * _WORTH_SAYING:g} %"


def timelines(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Memory over a step, stacked by category, of the records that hold it."""
    found = []
    for entry in entries:
        timeline = entry.record.timeline
        if timeline is not None and len(timeline.events) > 1 and max(timeline.totals) > 0:
            found.append({"case": entry.case, "anchor": anchor(entry)} | _areas(timeline))
    return found[:_MOST_TIMELINES]


def _areas(timeline: MemoryTimeline) -> dict[str, Any]:
    """Stacked areas over at most some hundred events, on an axis in GiB or MiB; the peak is among them."""
    totals = timeline.totals
    peak = totals.index(max(totals))
    size, unit = memory_unit(totals[peak])
    axis = linear([totals[peak] / size])
    every = max(1, math.ceil(len(totals) / _MOST_EVENTS))
    chosen = sorted({*range(0, len(totals), every), peak, len(totals) - 1})
    xs = [_along(timeline, timeline.events[index]) for index in chosen]
    below = [0] * len(chosen)
    areas = []
    for name in [each for each in CATEGORIES if each in timeline.bytes_by_category]:
        column = timeline.bytes_by_category[name]
        above = [base + max(0, column[index]) for base, index in zip(below, chosen, strict=True)]
        edge = [f"{x},{_high(axis, value / size)}" for x, value in zip(xs, above, strict=True)]
        floor = [f"{x},{_high(axis, value / size)}" for x, value in zip(reversed(xs), reversed(below), strict=True)]
        areas.append({"name": name, "path": " ".join([*edge, *floor])})
        below = above
    return {
        "areas": areas,
        "phases": _phases(timeline),
        "ticks": [(_high(axis, tick), f"{tick:g}") for tick in axis.ticks],
        "unit": unit,
        "peak": sizes.quantity(totals[peak], "bytes"),
        "peak_x": _along(timeline, timeline.events[peak]),
        "peak_y": _high(axis, totals[peak] / size),
    }


def _phases(timeline: MemoryTimeline) -> list[dict[str, Any]]:
    """Where each begins; the name of one near the end stands before its line."""
    found = []
    for index, name in enumerate(timeline.phases[:12]):
        at = next((event for event, phase in zip(timeline.events, timeline.phase, strict=True) if phase == index), None)
        if at is not None:
            x = _along(timeline, at)
            found.append({"name": plain(name, 20), "x": x, "side": "end" if x > _LATE else "start"})
    return found


def _along(timeline: MemoryTimeline, event: int) -> float:
    first, span = timeline.events[0], max(1, timeline.events[-1] - timeline.events[0])
    return round(44 + 548 * min(1.0, max(0.0, (event - first) / span)), 1)


def _high(axis: Axis, value: float) -> float:
    return round(190 - 175 * axis.at(value), 1)
