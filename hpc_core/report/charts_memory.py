"""Charts of memory: at the peak by category, and over a step.

Imports Altair, so import this module only where something is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import altair as alt

from hpc_core.case.errors import SpecError
from hpc_core.record import units
from hpc_core.record.plain import plain
from hpc_core.record.record import MemoryTimeline, Record
from hpc_core.report.chart_parts import Panel, colour, data, finite, stacked_panel
from hpc_core.report.entry import Entry

_CATEGORIES = {
    "weights": "#0072B2",
    "adapter": "#56B4E9",
    "gradients": "#E69F00",
    "optimizer": "#CC79A7",
    "kv_cache": "#F0E442",
    "activations": "#009E73",
    "temporaries": "#D55E00",
    "rounding": "#6B6B6B",
    "other": "#A8A8A8",
}
"""Categories of memory, from the persistent to the temporary. No timeline has rounding."""
_MOST_EVENTS = 400
_NEAR = 0.6
"""The peak's share of the GPU's memory from which on that memory is drawn; a line far above would flatten the rest."""


def memory_categories(entries: Sequence[Entry]) -> list[Panel]:
    """The categories of each case's peak, as a stacked bar."""
    held = {
        entry.case: {name: size for name in _CATEGORIES if (size := entry.value(f"at_peak_{name}_bytes") or 0.0) > 0}
        for entry in entries
    }
    chosen = [entry for entry in entries if held[entry.case] and finite(sum(held[entry.case].values()))]
    if not chosen:
        return []
    colours = {name.replace("_", " "): colour for name, colour in _CATEGORIES.items()}
    parts = {case: {name.replace("_", " "): size for name, size in sizes.items()} for case, sizes in held.items()}
    return [stacked_panel("Memory at the peak, by category", "{}", "bytes", chosen, parts, colours)]


def timelines(entries: Sequence[Entry]) -> list[Panel]:
    """Return the memory over a step of each record with a timeline, stacked by category."""
    found = []
    for entry in entries:
        timeline = entry.record.timeline
        if timeline is not None and len(timeline.events) > 1 and max(timeline.totals) > 0:
            found.append(Panel(f"Memory over a step: {entry.case}", memory_over_step(entry.record)))
    return found


def memory_over_step(record: Record, over: Record | None = None) -> alt.LayerChart:
    """Return a record's memory over a step, stacked by category, with phases and peak.

    `over` is a second record of the same step, such as a measured one over a prediction: its total becomes a line. Its events are
    stretched phase by phase, because two recorders do not count alike.

    Raises:
        SpecError: a record without a timeline, or with other phases.
    """
    timeline = _timeline(record)
    totals = timeline.totals
    peak = totals.index(max(totals))
    scale, unit = units.axis(totals[peak], "bytes")
    every = max(1, math.ceil(len(totals) / _MOST_EVENTS))
    chosen = sorted({*range(0, len(totals), every), peak, len(totals) - 1})
    first, last = min(timeline.events), max(*timeline.events, min(timeline.events) + 1)
    names = [name for name in _CATEGORIES if name in timeline.bytes_by_category]
    rows = []
    for index in chosen:
        begin = 0.0
        for name in names:
            end = begin + max(0, timeline.bytes_by_category[name][index]) / scale
            rows.append(
                {"event": timeline.events[index], "low": begin, "high": end, "category": name.replace("_", " ")}
            )
            begin = end
    memory, top = record.circumstances.machine.memory_bytes, totals[peak] / scale
    other = None if over is None else _stretched(timeline, record, over, scale)
    ceiling = 1.12 * max([top, *(row["total"] for row in other or ())])
    is_near = totals[peak] > _NEAR * memory
    if is_near:
        ceiling = max(ceiling, 1.05 * memory / scale)
    x = alt.X(
        "event:Q", title="allocations and frees since the step began", scale=alt.Scale(domain=[first, last], nice=False)
    )
    y = alt.Y(
        "low:Q",
        title=f"memory of tensors and scratch, {unit}",
        scale=alt.Scale(domain=[0, max(ceiling, 1e-9)], nice=False),
    )
    colours = {name.replace("_", " "): colour for name, colour in _CATEGORIES.items()}
    areas = alt.Chart(data(rows)).mark_area(interpolate="step-after").encode(
        x=x, y=y, y2="high:Q", color=colour("category", rows, colours), tooltip="category:N"
    )  # fmt: skip
    layers: list[Any] = [areas]
    if other is not None and over is not None:
        line = alt.Chart(data(other)).mark_line(interpolate="step-after", style="over", strokeWidth=1.2)
        layers.append(line.encode(x="event:Q", y="total:Q", strokeDash=_named_line("line")))
    if is_near:
        limit = alt.Chart(data([{"memory": memory / scale, "line": "the card's memory"}]))
        layers.append(limit.mark_rule(style="over").encode(y="memory:Q", strokeDash=_named_line("line")))
    spans = _extents(timeline)
    phases = [
        {"begin": begin, "middle": (begin + end) / 2, "phase": plain(timeline.phases[index], 20)}
        for index, (begin, end) in spans.items()
        if index >= 0
    ]
    if phases:
        marks = alt.Chart(data(phases))
        layers.append(marks.mark_rule(strokeDash=[2, 3], style="quiet").encode(x="begin:Q"))
        layers.append(marks.mark_text(dy=-7).encode(x="middle:Q", y=alt.value(0), text="phase:N"))
    at = timeline.events[peak]
    is_right = at > (first + last) / 2
    label = alt.Chart(data([{"event": at, "high": top, "text": f"peak {units.quantity(totals[peak], 'bytes')}"}]))
    layers.append(label.mark_point(filled=True, size=30, style="over").encode(x="event:Q", y="high:Q"))
    side = label.mark_text(align="right" if is_right else "left", dx=-6 if is_right else 6, dy=-8)
    layers.append(side.encode(x="event:Q", y="high:Q", text="text:N"))
    return alt.LayerChart(layer=[*layers], height=260)


def _named_line(field: str) -> alt.StrokeDash:
    scale = alt.Scale(
        domain=["measured, total", "predicted, total", "the card's memory"], range=[[1, 0], [1, 0], [5, 4]]
    )
    return alt.StrokeDash(f"{field}:N", title=None, scale=scale, legend=alt.Legend(orient="bottom"))


def _timeline(record: Record) -> MemoryTimeline:
    if record.timeline is None or not record.timeline.events:
        raise SpecError(f"The record of {record.case.id} holds no timeline: make it with --timeline.")
    return record.timeline


def _stretched(timeline: MemoryTimeline, record: Record, over: Record, scale: float) -> list[dict[str, Any]]:
    """Return the totals of `over` at the events of `timeline`, phase by phase."""
    other = _timeline(over)
    if other.phases != timeline.phases:
        raise SpecError(f"{over.case.id} has the phases {other.phases}, {record.case.id} {timeline.phases}.")
    ours, theirs = _extents(timeline), _extents(other)
    name = f"{'predicted' if 'predicted' in over.circumstances.gpu else 'measured'}, total"
    rows = []
    for event, phase, total in zip(other.events, other.phase, other.totals, strict=True):
        begin, end = ours.get(phase, (timeline.events[0], timeline.events[0]))
        first, last = theirs[phase]
        rows.append(
            {
                "event": begin + (end - begin) * (event - first) / max(last - first, 1),
                "total": total / scale,
                "line": name,
            }
        )
    return rows


def _extents(timeline: MemoryTimeline) -> dict[int, tuple[int, int]]:
    """Return the first and last event of each phase; a phase ends where the next begins."""
    firsts = {phase: event for event, phase in reversed(list(zip(timeline.events, timeline.phase, strict=True)))}
    ends = [*list(firsts.values())[-2::-1], timeline.events[-1]]
    return {phase: (firsts[phase], end) for phase, end in zip(sorted(firsts), ends, strict=True)}
