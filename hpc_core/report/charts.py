"""Every chart of a report as an Altair definition. One definition gives a picture (SVG, PNG, PDF) and the page's interactive chart.

A chart has no width, colours of its theme or title: `pictures` and the page add these. Names from records appear only as data and as literal
text, never as a field's name or an expression. Imports Altair, so import this module only where something is drawn.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, Literal

import altair as alt

from hpc_core.bounds.check import flops_text
from hpc_core.explain.time import wall_parts
from hpc_core.record import units
from hpc_core.record.plain import plain
from hpc_core.report.chart_parts import (
    FAMILIES,
    MOST_ROWS,
    Panel,
    Row,
    bar_panel,
    colour,
    counted,
    data,
    family,
    finite,
    href,
    label_of,
    stacked_panel,
)
from hpc_core.report.charts_memory import memory_categories
from hpc_core.report.entry import BUSY, WALL, Entry
from hpc_core.report.history import Series, change_text
from hpc_core.report.roofline import newest_roofs, points_of
from hpc_core.report.tradeoff import Ablation, ablations_of, comparable, front, speed_of

_WORKS = {"step": "#0072B2", "prefill": "#009E73", "decode": "#D55E00"}
_WORK_NAMES = {"step": "training step", "prefill": "prefill", "decode": "decoded token"}
_PARTS = {
    "Python": "#E69F00",
    "dispatch": "#0072B2",
    "operators": "#0072B2",
    "launch": "#56B4E9",
    "waiting": "#A8A8A8",
}
"""What the host does. Waiting is grey: there the GPU sets the pace."""
_MOST_POINTS = 120
_MOST_GROUPS = 4
_MOST_ABLATIONS = 3
_MOST_EFFECTS = 16
_MOST_LINES = 40


_LOG = alt.Axis(tickCount=5, titleAnchor="end")


def inference_memory(entries: Sequence[Entry]) -> list[Panel]:
    """Peak memory of generation."""
    return _of_kind(entries, "generate", "Inference: peak memory", ("peak_bytes",), "{} allocated by tensors")


def inference_latency(entries: Sequence[Entry]) -> list[Panel]:
    """Wall time of a decoded token, within it the time that the GPU was busy; and what the host does in it."""
    unit = "{} per decoded token: wall time; dark: GPU-busy"
    names = ("decode_token_s", *BUSY)
    return [
        *_of_kind(entries, "generate", "Inference: latency", names, unit, ("busy_decode_token_s",)),
        *_split(entries, "generate", "Inference: where a token's time goes", "busy_decode_token_s"),
    ]


def inference_throughput(entries: Sequence[Entry]) -> list[Panel]:
    """New tokens a second, prefill included."""
    unit = "new tokens per second of wall time, prefill included"
    return _of_kind(entries, "generate", "Inference: throughput", ("tokens_per_s",), unit)


def finetune(entries: Sequence[Entry]) -> list[Panel]:
    """Time and memory of a training step."""
    return [
        *_of_kind(entries, "finetune", "Fine-tuning: time of a step", ("step_s",), "{}: wall time; dark: GPU-busy", ("busy_s",)),
        *_split(entries, "finetune", "Fine-tuning: where a step's time goes", "busy_s"),
        *_of_kind(entries, "finetune", "Fine-tuning: peak memory", ("peak_bytes",), "{} allocated by tensors"),
    ]  # fmt: skip


def own_steps(entries: Sequence[Entry]) -> list[Panel]:
    """Time and memory of the user's own steps."""
    return [
        *_of_kind(entries, "callable", "Own steps: time", WALL, "{}: wall time; dark: GPU-busy", BUSY),
        *_split(entries, "callable", "Own steps: where a step's time goes", "busy_s"),
        *_of_kind(entries, "callable", "Own steps: peak memory", ("peak_bytes",), "{} allocated by tensors"),
    ]


def _of_kind(
    entries: Sequence[Entry], kind: str, title: str, names: Sequence[str], unit: str, busy: Sequence[str] = ()
) -> list[Panel]:
    """Return a panel of the first of these metrics, or none where no case of this kind has one."""
    chosen = [each for each in entries if each.record.case.kind == kind and finite(each.value(*names))]
    if not chosen:
        return []
    shown = chosen[:MOST_ROWS]
    values = [entry.value(*names) or 0.0 for entry in shown]
    scale, name = units.axis(max(map(abs, values)), _metric_unit(shown[0], names))
    rows = []
    for entry, value in zip(shown, values, strict=True):
        row = _row(entry, shown) | {"value": value / scale, "text": _value_text(entry, names)}
        within = entry.value(*busy) if busy else None
        if within is not None and finite(within):
            row["busy"] = within / scale
        spread = entry.spread(*names)
        if spread is not None and finite(spread.low) and finite(spread.high) and spread.high > spread.low:
            text = units.pair(spread.low, spread.high, _metric_unit(entry, names)).replace("→", "to")
            row |= {"low": spread.low / scale, "high": spread.high / scale, "range": f"{text} in {spread.count}"}
        rows.append(row)
    return [bar_panel(counted(title, shown, chosen), unit.format(name), rows, FAMILIES)]


def _split(entries: Sequence[Entry], kind: str, title: str, busy: str) -> list[Panel]:
    """Return what the host does in a token or step, as stacked bars with the GPU's busy time within; none without such cases."""
    parts = {entry.case: wall_parts(entry.record) for entry in entries if entry.record.case.kind == kind}
    chosen = [each for each in entries if parts.get(each.case) and finite(sum(parts[each.case].values()))]
    if not chosen:
        return []
    times = {each.case: value for each in chosen if (value := each.value(busy)) is not None and finite(value)}
    dark = "; dark: GPU-busy, beside it" if times else ""
    return [stacked_panel(title, f"{{}}: wall time by what the host does{dark}", "s", chosen, parts, _PARTS, times)]


def speed_memory(entries: Sequence[Entry]) -> list[Panel]:
    """Speed against memory, a panel for each model and kind of work with at least two cases.

    Stairs join the cases that no other beats in both.
    """
    groups = []
    for (_, shape, kind), group in comparable(entries).items():
        timed = [entry for entry in group if speed_of(entry) is not None and finite(entry.value("peak_bytes"))]
        if len(timed) >= 2:
            groups.append((shape, kind, timed))
    groups.sort(key=lambda each: -len(each[2]))  # those that compare most
    shown = groups[:_MOST_GROUPS]
    panels = [_tradeoff(f"Speed against memory: {shape}, {kind}", timed) for shape, kind, timed in shown]
    if len(groups) > len(shown):
        last = panels[-1]
        panels[-1] = last._replace(title=f"{last.title} (and {len(groups) - len(shown)} more models)")
    return panels


def _tradeoff(title: str, timed: Sequence[Entry]) -> Panel:
    shown = timed[:MOST_ROWS]
    scale, unit = units.axis(max(entry.value("peak_bytes") or 0.0 for entry in shown), "bytes")
    points = [((entry.value("peak_bytes") or 0.0) / scale, speed_of(entry) or 0.0) for entry in shown]
    best = front(points)
    right = 1.25 * max(x for x, _ in points)
    rows: list[dict[str, Any]] = [
        _row(entry, shown) | {"x": x, "y": y, "memory": f"{x:.2f} {unit}", "speed": f"{y:,.4g} tokens/s"}
        for entry, (x, y) in zip(shown, points, strict=True)
    ]
    low, high = min(y for _, y in points) / 1.6, max(y for _, y in points) * 1.6
    _label(rows, lambda x: x / right, _log_place([low, high]), first=best)
    stairs = [{"x": points[index][0], "y": points[index][1]} for index in best]
    stairs.append({"x": right, "y": stairs[-1]["y"]})
    x = alt.X("x:Q", title=f"peak memory, {unit}", scale=alt.Scale(domain=[0, right], nice=False))
    y = alt.Y(
        "y:Q", title="tokens per second (log)", axis=_LOG, scale=alt.Scale(type="log", domain=[low, high], nice=False)
    )
    tooltip = [alt.Tooltip(f"{name}:N") for name in ("case", "memory", "speed", "group")]
    base = alt.Chart(data(rows)).encode(x=x, y=y)
    marks = base.mark_point(filled=True, size=70, opacity=1).encode(
        color=colour("group", rows, FAMILIES), tooltip=tooltip, href="href:N"
    )
    line = (
        alt.Chart(data(stairs)).mark_line(interpolate="step-after", strokeDash=[4, 3], style="quiet").encode(x=x, y=y)
    )
    return Panel(counted(title, shown, timed), alt.LayerChart(layer=[line, marks, *_names(rows, x, y)], height=320))


def roofline(entries: Sequence[Entry]) -> list[Panel]:
    """Every case with a closed form, under the roofs of the newest session."""
    points = points_of(entries)[:_MOST_POINTS]
    if not points:
        return []
    roofs = newest_roofs(entries)
    ridges = [roof.flop_per_s / roof.bytes_per_s for roof in roofs]
    low = min(point.intensity for point in points) / 2
    high = max([*(point.intensity for point in points), *ridges]) * 2
    rows: list[dict[str, Any]] = [
        {
            "x": point.intensity,
            "y": point.flop_per_s / 1e12,
            "case": label_of(point.entry, entries),
            "work": _WORK_NAMES[point.work],
            "rate": f"{flops_text(point.flop_per_s)} of {'GPU-busy' if point.is_busy else 'wall'} time",
            "href": href(point.entry),
        }
        for point in points
    ]
    bottom = min(row["y"] for row in rows) / 1.6
    ends = {f"{roof.name}: {flops_text(roof.flop_per_s)}, {roof.bytes_per_s / 1e12:.2f} TB/s": roof for roof in roofs}
    lines = [
        {"x": at, "y": max(min(roof.flop_per_s, at * roof.bytes_per_s) / 1e12, bottom), "roof": name}
        for name, roof in ends.items()
        for at in (low, bottom * 1e12 / roof.bytes_per_s, min(max(roof.flop_per_s / roof.bytes_per_s, low), high), high)
        if low <= at <= high
    ]
    top = 1.3 * max(row["y"] for row in [*rows, *lines])
    _label(rows, _log_place([low, high]), _log_place([bottom, top]))
    x = alt.X(
        "x:Q",
        title="FLOP per byte, at least (log)",
        axis=_LOG,
        scale=alt.Scale(type="log", domain=[low, high], nice=False),
    )
    y = alt.Y("y:Q", title="TFLOP/s (log)", axis=_LOG, scale=alt.Scale(type="log", domain=[bottom, top], nice=False))
    colours = {_WORK_NAMES[work]: colour for work, colour in _WORKS.items()}
    marks = (
        alt.Chart(data(rows))
        .mark_point(filled=True, size=70, opacity=1)
        .encode(
            x=x,
            y=y,
            color=colour("work", rows, colours),
            tooltip=[alt.Tooltip(f"{name}:N") for name in ("case", "work", "rate")],
            href="href:N",
        )
    )
    layers = [marks, *_names(rows, x, y)]
    if lines:
        dash = alt.StrokeDash(
            "roof:N", sort=None, title=None, legend=alt.Legend(orient="bottom", columns=1, labelLimit=420)
        )
        layers.insert(0, alt.Chart(data(lines)).mark_line(style="roof").encode(x=x, y=y, strokeDash=dash))
    title = "Roofline: the least work of each case over the time that it took"
    return [Panel(title, alt.LayerChart(layer=[*layers], height=380))]


def ablation(entries: Sequence[Entry]) -> list[Panel]:
    """The effect of one to three changed fields on memory and time, as factors of a base case."""
    found = ablations_of(entries)[:_MOST_ABLATIONS]
    return [_factors(each, what) for each in found for what in ("memory", "time")]


def _factors(found: Ablation, what: str) -> Panel:
    effects = found.effects[:_MOST_EFFECTS]
    base = found.base.case.partition("/")[2]
    rows = [{"case": f"{base} (base)", "value": 1.0, "text": "1", "group": family(found.base)}]
    for each in effects:
        factor = each.memory if what == "memory" else each.time
        changes = plain(", ".join(each.changes), 70)
        name = f"{each.entry.case.partition('/')[2]}: {changes}"
        known = factor is not None and finite(factor)
        rows.append(
            {"case": name, "value": factor if known else 0.0, "text": f"{factor:.3g}" if known else "-", "group": family(each.entry)}
        )  # fmt: skip
    metric = "peak memory" if what == "memory" else (found.time_metric or "time")
    cut = f" (the first {len(effects)} of {len(found.effects)} cases)" if len(found.effects) > len(effects) else ""
    return bar_panel(
        f"Ablation of {found.base.case}: {what}{cut}", f"{metric}, times the base's", rows, FAMILIES, mark=1.0
    )


PICTURES: dict[str, Callable[[Sequence[Entry]], list[Panel]]] = {
    "inference-memory": inference_memory,
    "inference-latency": inference_latency,
    "inference-throughput": inference_throughput,
    "finetune": finetune,
    "speed-memory": speed_memory,
    "roofline": roofline,
    "memory-categories": memory_categories,
    "ablation": ablation,
}
"""By file name; a function that finds no number for it returns no panel."""


def sessions(entries: Sequence[Entry]) -> list[Panel]:
    """Return how peak memory, GPU-busy and wall time of each case moved since its first session, where it has several."""
    panels = []
    for title, names in (("Peak memory", ("peak_bytes",)), ("GPU-busy time", BUSY), ("Wall time", WALL)):
        lines = [line for entry in entries if (line := _since_first(entry, names))][:_MOST_LINES]
        if not lines:
            continue
        rows = [row for line in lines for row in line]
        low, high = min(row["change"] for row in rows), max(row["change"] for row in rows)
        # At least 5 % each way, so that noise looks like noise.
        scale = alt.Scale(domain=[min(low, -0.05), max(high, 0.05)])
        base = alt.Chart(data(rows)).encode(
            x=alt.X("session:Q", title="session", axis=alt.Axis(format="d", tickMinStep=1), scale=alt.Scale(zero=False, nice=False)),
            y=alt.Y("change:Q", title="since the first session", axis=alt.Axis(format="+.3~p"), scale=scale),
        )  # fmt: skip
        tooltip = [alt.Tooltip(f"{name}:N") for name in ("case", "when", "value")]
        dots = base.mark_point(filled=True, size=36, opacity=0.8, color="#0072B2").encode(
            tooltip=tooltip, href="href:N"
        )
        line = base.mark_line(opacity=0.6, color="#0072B2").encode(detail="case:N")
        panels.append(Panel(f"Over sessions: {title.lower()}", alt.LayerChart(layer=[line, dots], height=200)))
    return panels


def _since_first(entry: Entry, names: Sequence[str]) -> list[dict[str, Any]]:
    name = entry.name_of(*names)
    found = [(record, record.metrics[name]) for record in entry.past if name in record.metrics] if name else []
    values = [float(metric.value) for _, metric in found]
    if len(values) < 2 or not all(map(finite, values)) or values[0] <= 0 or len({each.unit for _, each in found}) > 1:
        return []
    return [
        {
            "case": entry.case,
            "session": number,
            "change": value / values[0] - 1,
            "value": units.quantity(value, metric.unit),
            "when": plain(record.circumstances.started_at[:16], 20),
            "href": href(entry),
        }
        for number, ((record, metric), value) in enumerate(zip(found, values, strict=True), start=1)
    ]


def history(each: Series) -> alt.LayerChart:
    """Return values over sessions, the median between change points, and at each change point what moved."""
    scale, unit = units.axis(max(map(abs, each.values)), each.unit)
    rows = [
        {
            "session": number,
            "value": value / scale,
            "text": units.quantity(value, each.unit),
            "when": f"{point.at[:10]} {(point.commit or '')[:7]}".strip(),
        }
        for number, (point, value) in enumerate(zip(each.points, each.values, strict=True), start=1)
    ]
    edges = [0, *(change.index for change in each.changes), len(each.values)]
    levels = [
        {"from": begin + 0.6, "to": end + 0.4, "value": median(each.values[begin:end]) / scale}
        for begin, end in itertools.pairwise(edges)
    ]
    names = {number: str(row["when"]) for number, row in enumerate(rows, start=1)}
    ticks = list(names)[:: max(1, -(-len(names) // 12))]
    dates = "({})[datum.value]".format("{" + ",".join(f"{tick}:'{_quoted(names[tick])}'" for tick in ticks) + "}")
    x = alt.X(
        "session:Q",
        title=None,
        scale=alt.Scale(domain=[0.4, len(rows) + 0.6], nice=False),
        axis=alt.Axis(values=ticks, labelExpr=dates, labelAngle=-35, grid=False),
    )
    y = alt.Y("value:Q", title=f"{each.metric}, {unit}" if unit else each.metric, scale=alt.Scale(zero=False))
    dots = alt.Chart(data(rows)).mark_point(filled=True, size=45, opacity=1, color="#0072B2")
    layers = [
        alt.Chart(data(levels)).mark_rule(color="#0072B2").encode(x="from:Q", x2="to:Q", y="value:Q"),
        dots.encode(x=x, y=y, tooltip=["when:N", "text:N"]),
    ]
    if each.changes:
        moved = [
            {"at": change.index + 0.5, "text": change_text(each, change).partition(";")[0]} for change in each.changes
        ]
        marks = alt.Chart(data(moved)).encode(x="at:Q")
        layers += [
            marks.mark_rule(color="#D55E00", strokeDash=[4, 3]),
            marks.mark_text(color="#D55E00", align="left", dx=4, dy=8).encode(y=alt.value(0), text="text:N"),
        ]
    return alt.LayerChart(layer=[*layers], height=260)


def _names(rows: Sequence[Row], x: alt.X, y: alt.Y) -> list[alt.Chart]:
    """Return the names of the points that `_label` chose, right or left of them."""
    found: list[alt.Chart] = []
    sides: tuple[tuple[Literal["left", "right"], int], ...] = (("left", 7), ("right", -7))
    for side, shift in sides:
        named = [row for row in rows if row.get("side") == side]
        if named:
            mark = alt.Chart(data(named)).mark_text(align=side, dx=shift, dy=-7, style="name")
            found.append(mark.encode(x=x, y=y, text="case:N"))
    return found


def _label(
    rows: list[dict[str, Any]],
    across: Callable[[float], float],
    up: Callable[[float], float],
    first: Sequence[int] = (),
) -> None:
    """Give a `side` to as many points as have room for their name, those in `first` before the others.

    `across` and `up` place a value between 0 and 1. Room is counted in letters and lines of a chart of usual size.
    """
    letter, line = 0.0105, 0.045
    places = [(across(row["x"]), up(row["y"])) for row in rows]
    taken = [(a - 0.008, b - 0.015, a + 0.008, b + 0.015) for a, b in places]
    for index in sorted(range(len(rows)), key=lambda each: each not in first):
        (a, b), width = places[index], letter * len(rows[index]["case"])
        for side, left in (("left", a + 0.012), ("right", a - 0.012 - width)):
            box = (left, b, left + width, b + line)
            if box[0] >= 0 and box[2] <= 1 and not any(_overlap(box, each) for each in taken):
                taken.append(box)
                rows[index]["side"] = side
                break


def _overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _log_place(values: Sequence[float]) -> Callable[[float], float]:
    low, high = math.log(min(values)), math.log(max(values))
    return lambda value: (math.log(value) - low) / max(high - low, 1e-9)


def _row(entry: Entry, among: Sequence[Entry]) -> dict[str, Any]:
    return {"case": label_of(entry, among), "group": family(entry), "href": href(entry)}


def _metric_unit(entry: Entry, names: Sequence[str]) -> str:
    name = entry.name_of(*names)
    assert name is not None
    return entry.metrics[name].unit


def _value_text(entry: Entry, names: Sequence[str]) -> str:
    value, unit = entry.value(*names) or 0.0, _metric_unit(entry, names)
    if unit == "tokens/s":
        return f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"
    return plain(units.quantity(value, unit), 60)


def _quoted(text: str) -> str:
    """Return a date and commit without characters that could end a string in an expression."""
    return "".join(letter for letter in text if letter.isalnum() or letter in " -:")
