"""Points on two axes: speed against memory with the front of cases that none beats, and every case under the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hpc_core.baselines.reading import plain
from hpc_core.bounds.reading import flops_text
from hpc_core.report.entry import Entry
from hpc_core.report.memory_unit import peak_unit
from hpc_core.report.plots.style import INK, colour_of, legend_of, most, plain_log, settle
from hpc_core.report.roofline import newest_roofs, points_of
from hpc_core.report.tradeoff import comparable, front, speed_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_roofline", "draw_speed_memory"]

_MOST_PANELS = 4
_LEAST_POINTS = 2
_MOST_NAMES = 40
"""Of a picture; more would cover the points, and few of them find room."""
_WORKS = {
    "step": ("s", "#0072B2", "training step"),
    "prefill": ("^", "#009E73", "prefill"),
    "decode": ("o", "#D55E00", "decoded token"),
}


def draw_speed_memory(figure: Figure, entries: Sequence[Entry]) -> bool:
    """A panel for each model and kind of work with two cases or more."""
    groups = []
    for (_, shape, kind), group in comparable(entries).items():
        timed = [entry for entry in group if speed_of(entry) is not None]
        if len(timed) >= _LEAST_POINTS:
            chosen, told = most(timed, f"{shape}, {kind}")
            groups.append((told, chosen))
    # The panels that compare most, where there are more groups than panels.
    groups.sort(key=lambda each: -len(each[1]))
    if not groups:
        return False
    left_out = f" (and {len(groups) - _MOST_PANELS} more models)" if len(groups) > _MOST_PANELS else ""
    groups = groups[:_MOST_PANELS]
    figure.set_size_inches(5.2 * min(2, len(groups)), 4.3 * -(-len(groups) // 2))
    panels = iter(figure.subplots(-(-len(groups) // 2), min(2, len(groups)), squeeze=False).flat)
    for (title, chosen), axes in zip(groups, panels, strict=False):
        _panel(axes, plain(title, 90), chosen)
    for axes in panels:  # those that are left
        axes.set_visible(False)
    legend_of(figure, [entry for _, chosen in groups for entry in chosen])
    figure.suptitle(
        f"Speed against memory; the dashed stairs join the cases that none beats in both{left_out}",
        fontsize=9,
        x=0.01,
        ha="left",
    )
    settle(figure, entries)  # names are put beside where the points then lie
    for axes, (_, chosen) in zip(figure.axes, groups, strict=False):
        _name(
            figure,
            axes,
            [(each.case.partition("/")[2], *_point(each, peak_unit(chosen)[0]), False) for each in chosen],
        )
    return True


def _panel(axes: Axes, title: str, entries: Sequence[Entry]) -> None:
    size, unit = peak_unit(entries)
    points = [_point(each, size) for each in entries]
    best = front(points)
    stairs = [points[index] for index in best]
    axes.step(*zip(*stairs, strict=True), where="post", color="#888888", linewidth=1, linestyle="--", zorder=1)
    # An area in square points: the same size as the roofline's markers.
    axes.scatter(
        [x for x, _ in points], [y for _, y in points], s=36, c=[colour_of(entry) for entry in entries], zorder=2
    )
    axes.set_yscale("log")
    plain_log(axes, y=True)
    axes.margins(y=0.12)
    axes.set_xlim(0, 1.3 * max(x for x, _ in points))
    axes.set_title(title)
    axes.set_xlabel(f"peak memory, {unit}")
    axes.set_ylabel("tokens a second (log)")


def _point(entry: Entry, size: int) -> tuple[float, float]:
    """Peak memory in units of so many bytes, and speed."""
    return (entry.value("peak_bytes") or 0.0) / size, speed_of(entry) or 0.0


def draw_roofline(figure: Figure, entries: Sequence[Entry]) -> bool:
    """Every case with a closed form, under the rates that were measured beside it."""
    points = points_of(entries)
    if not points:
        return False
    figure.set_size_inches(9.0, 5.2)
    axes = figure.add_subplot()
    low, high = min(p.intensity for p in points) / 2, max(p.intensity for p in points) * 4
    _roofs(axes, entries, low, high)
    for work, (marker, colour, label) in _WORKS.items():
        own = [point for point in points if point.work == work]
        if own:
            axes.plot(
                [p.intensity for p in own],
                [p.flop_per_s / 1e12 for p in own],
                marker,
                color=colour,
                label=label,
                markersize=6,
                zorder=2,
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    plain_log(axes, x=True, y=True)
    axes.set_xlim(low, high)
    axes.set_xlabel("FLOP a byte, at least (log)")
    axes.set_ylabel("TFLOP/s over GPU-busy time (log)")
    axes.set_title("Roofline: the least work of each case over the time that it took")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    settle(figure, entries)  # names are put beside where the points then lie
    _name(figure, axes, [(p.entry.case.partition("/")[2], p.intensity, p.flop_per_s / 1e12, False) for p in points])
    return True


def _roofs(axes: Axes, entries: Sequence[Entry], low: float, high: float) -> None:
    """Each bound from the left edge up its slope and along its flat part, named in the legend."""
    styles = iter(("-", "-.", ":", (0, (5, 1, 1, 1, 1, 1))))
    for roof in newest_roofs(entries):
        ridge, top = roof.flop_per_s / roof.bytes_per_s, roof.flop_per_s / 1e12
        axes.plot(
            [low, ridge, max(high, ridge)],
            [low * roof.bytes_per_s / 1e12, top, top],
            color=INK if roof.is_measured else "#888888",
            linewidth=1.0,
            linestyle=next(styles, ":") if roof.is_measured else "--",
            label=f"{roof.name}: {flops_text(roof.flop_per_s)}",
            zorder=1,
        )


def _room_ends(figure: Figure, axes: Axes) -> float:
    """Where names must end, in pixels: before the words left of the next panel, or at the figure's edge."""
    beside = [each for each in figure.axes if each.get_visible() and each.bbox.x0 > axes.bbox.x1]
    starts = [box.x0 for each in beside if (box := each.get_tightbbox(for_layout_only=True)) is not None]
    return float(min([figure.bbox.x1, *starts]))


def _name(figure: Figure, axes: Axes, points: Sequence[tuple[str, float, float, bool]]) -> None:
    """Names beside the points, as many as do not overlap; those of the front first and in bold."""
    pixels = [axes.transData.transform((x, y)) for _, x, y, _ in points]
    scale, first, last = figure.dpi / 72, axes.bbox.x0, _room_ends(figure, axes)
    taken = [(a - 4 * scale, b - 4 * scale, a + 4 * scale, b + 4 * scale) for a, b in pixels]
    for index in sorted(range(len(points)), key=lambda each: not points[each][3])[:_MOST_NAMES]:
        label, (a, b) = plain(points[index][0], 40), pixels[index]
        width, height = 3.9 * scale * len(label), 8 * scale
        for side, right, rise in (
            ("left", 7, 0),
            ("right", -7, 0),
            ("left", 7, 8),
            ("left", 7, -8),
            ("right", -7, 8),
            ("right", -7, -8),
        ):
            start = a + right * scale - (width if side == "right" else 0)
            box = (start, b + (rise - 4) * scale, start + width, b + (rise - 4) * scale + height)
            if (
                box[0] < first
                or box[2] > last
                or any(box[0] < o[2] and o[0] < box[2] and box[1] < o[3] and o[1] < box[3] for o in taken)
            ):
                continue
            taken.append(box)
            weight = "bold" if points[index][3] else "normal"
            note = axes.annotate(
                label,
                points[index][1:3],
                xytext=(right, rise),
                textcoords="offset points",
                ha=side,
                va="center",
                fontsize=7,
                weight=weight,
                bbox={
                    "facecolor": "white",
                    "edgecolor": "none",
                    "pad": 0.6,
                },  # lines pass behind a name, not through it
            )
            note.set_in_layout(False)
            break
