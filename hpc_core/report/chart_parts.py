"""What the charts share: a panel, horizontal bars, colours, names of cases.

Imports Altair, so import this module only where something is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import altair as alt

from hpc_core.record import units
from hpc_core.report.entry import Entry

# Okabe and Ito's colours, which people with any colour blindness can tell apart.
FAMILIES = {
    "unquantized": "#0072B2",
    "4 bit": "#D55E00",
    "int8": "#009E73",
    "full": "#CC79A7",
    "LoRA": "#56B4E9",
    "QLoRA": "#E69F00",
    "own step": "#999999",
}
MOST_ROWS = 30
ROW_HEIGHT = 22
Row = Mapping[str, Any]
AXIS = alt.Axis(titleAnchor="end")
"""A long title at the end of its axis may extend below the names."""


class Panel(NamedTuple):
    """One chart with a title of its own; a picture is one panel or several."""

    title: str
    chart: alt.LayerChart


def bar_panel(
    title: str,
    unit: str,
    rows: Sequence[Row],
    colours: Mapping[str, str],
    *,
    room: float = 1.42,
    mark: float | None = None,
) -> Panel:
    """Return horizontal bars from the top down with their values at their ends.

    A row holds `case` (unique), `value`, `text` and `group` (a key of `colours`). Optional are `busy`, a thinner and darker bar within;
    `low` and `high`, a whisker; `href`; and `changes`, for the tooltip. The axis ends at `room` times the longest bar; a line marks the
    value `mark`.
    """
    ends = [max(row["value"], row.get("high", 0.0)) for row in rows]
    rows = [{**row, "end": end} for row, end in zip(rows, ends, strict=True)]
    base = alt.Chart(data(rows)).encode(y=alt.Y("case:N", sort=None, title=None))
    length = alt.X("value:Q", title=unit, axis=AXIS, scale=alt.Scale(domain=[0, room * max([*ends, 1e-9])], nice=False))
    details = {"case": "case", "text": "value", "range": "range", "group": "kind", "changes": "changed"}
    tooltip = [
        alt.Tooltip(f"{name}:N", title=title) for name, title in details.items() if any(name in row for row in rows)
    ]
    bars = base.mark_bar(height={"band": 0.72}).encode(x=length, color=colour("group", rows, colours), tooltip=tooltip)
    if any("href" in row for row in rows):
        bars = bars.encode(href="href:N")
    layers = [bars]
    if any(row.get("busy") for row in rows):
        layers.append(base.mark_bar(height={"band": 0.28}, style="busy").encode(x="busy:Q"))
    ranged = [row for row in rows if row.get("high", 0.0) > row.get("low", 0.0)]
    if ranged:
        whiskers = alt.Chart(data(ranged)).encode(y=alt.Y("case:N", sort=None))
        layers.append(whiskers.mark_rule().encode(x="low:Q", x2="high:Q"))
        layers += [whiskers.mark_tick(size=8).encode(x=f"{end}:Q") for end in ("low", "high")]
    layers.append(base.mark_text(align="left", dx=5).encode(x="end:Q", text="text:N"))
    if mark is not None:
        line = alt.Chart(data([{"mark": mark}])).mark_rule(strokeDash=[4, 3], style="quiet")
        layers.append(line.encode(x="mark:Q"))
    return Panel(title, alt.LayerChart(layer=layers, height=ROW_HEIGHT * len(rows)))


def stacked_panel(
    title: str,
    axis: str,
    unit: str,
    chosen: Sequence[Entry],
    parts: Mapping[str, Mapping[str, float]],
    colours: Mapping[str, str],
    busy: Mapping[str, float] | None = None,
) -> Panel:
    """Return horizontal bars of parts that add up, with their sums at their ends.

    Args:
        title: of the panel.
        axis: title of the axis, with "{}" for the unit that is chosen.
        unit: of the parts: "bytes" or "s".
        chosen: the cases from the top down; the first thirty are drawn.
        parts: by case and name, in the order in which they are stacked.
        colours: by name of a part.
        busy: by case, a thinner and darker bar within.
    """
    shown = chosen[:MOST_ROWS]
    most = max(sum(parts[entry.case].values()) for entry in shown)
    scale, name_of_unit = units.axis(most, unit)
    rows, totals = [], []
    for entry in shown:
        begin = 0.0
        label = label_of(entry, shown)
        for name, size in parts[entry.case].items():
            part = {"case": label, "part": name, "low": begin / scale, "high": (begin + size) / scale}
            rows.append(part | {"text": units.quantity(size, unit), "href": href(entry)})
            begin += size
        total = {"case": label, "high": begin / scale, "text": units.quantity(begin, unit)}
        totals.append(total | ({"busy": busy[entry.case] / scale} if busy and entry.case in busy else {}))
    y = alt.Y("case:N", sort=None, title=None)
    x = alt.X(
        "low:Q",
        title=axis.format(name_of_unit),
        axis=AXIS,
        scale=alt.Scale(domain=[0, 1.42 * most / scale], nice=False),
    )
    bars = (
        alt.Chart(data(rows))
        .mark_bar(height={"band": 0.72})
        .encode(
            y=y,
            x=x,
            x2="high:Q",
            color=colour("part", rows, colours),
            tooltip=["case:N", "part:N", alt.Tooltip("text:N", title=unit)],
            href="href:N",
        )
    )
    ends = alt.Chart(data(totals)).encode(y=y)
    layers: list[Any] = [bars]
    if busy:
        layers.append(ends.mark_bar(height={"band": 0.28}, style="busy").encode(x="busy:Q"))
    layers.append(ends.mark_text(align="left", dx=5).encode(x="high:Q", text="text:N"))
    return Panel(counted(title, shown, chosen), alt.LayerChart(layer=layers, height=ROW_HEIGHT * len(shown)))


def data(rows: Sequence[Row]) -> alt.InlineData:
    """Return rows as a chart's data."""
    return alt.InlineData(values=[dict(row) for row in rows])


def colour(field: str, rows: Sequence[Row], colours: Mapping[str, str]) -> alt.Color:
    """Return a colour for each value in the rows, with a legend where there are several."""
    used = [name for name in colours if any(row[field] == name for row in rows)]
    scale = alt.Scale(domain=used, range=[colours[name] for name in used])
    legend = alt.Legend(orient="top", title=None) if len(used) > 1 else None
    return alt.Color(f"{field}:N", scale=scale, legend=legend)


def label_of(entry: Entry, among: Sequence[Entry]) -> str:
    """Return the variant, followed by the model where there are several, because a long name is cut at its end."""
    shapes = {each.case.partition("/")[0] for each in among}
    shape, _, variant = entry.case.partition("/")
    return f"{variant} · {shape}" if len(shapes) > 1 else variant


def family(entry: Entry) -> str:
    """Return the kind of quantization or training, by which bars are coloured."""
    case = entry.record.case
    if case.kind == "callable":
        return "own step"
    if case.kind == "generate":
        if case.quantization is None:
            return "unquantized"
        return "int8" if case.quantization.kind == "int8" else "4 bit"
    if case.adapter is None:
        return "full"
    return "LoRA" if case.quantization is None else "QLoRA"


def href(entry: Entry) -> str:
    """Return a link to the case's details on the page."""
    return f"#{entry.anchor}"


def counted(title: str, shown: Sequence[Entry], chosen: Sequence[Entry]) -> str:
    """Return a title that says how many of the chosen cases are shown, where some are left out."""
    return f"{title} (the first {len(shown)} of {len(chosen)} cases)" if len(shown) < len(chosen) else title


def finite(value: float | None) -> bool:
    """Return whether a chart can draw a value."""
    return value is not None and math.isfinite(value) and abs(value) < 1e300
