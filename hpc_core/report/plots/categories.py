"""Memory at the peak, stacked by category, a bar a case."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hpc_core.record import units as sizes
from hpc_core.report.entry import Entry
from hpc_core.report.memory_plot import CATEGORY_COLOURS
from hpc_core.report.memory_unit import memory_unit
from hpc_core.report.plots.style import bars, beside, label_of, most, name_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_categories"]

# From what stays to what passes; rounding, which no timeline shows, before what is left.
_COLOURS = {name: colour for name, colour in CATEGORY_COLOURS.items() if name != "other"} | {
    "rounding": "#555555",
    "other": CATEGORY_COLOURS["other"],
}


def draw_categories(figure: Figure, entries: Sequence[Entry]) -> bool:
    """What the peak is made of."""
    from matplotlib.patches import Patch

    chosen = [each for each in entries if any(_held(each, name) > 0 for name in _COLOURS)]
    if not chosen:
        return False
    shown, title = most(chosen, "Memory at the peak, by category")
    figure.set_size_inches(8.5, 1.6 + 0.28 * len(shown))
    axes = figure.add_subplot()
    size, unit = memory_unit(max(sum(_held(entry, name) for name in _COLOURS) for entry in shown))
    left = [0.0] * len(shown)
    handles = []
    for name, colour in _COLOURS.items():
        held = [_held(entry, name) / size for entry in shown]
        if any(held):
            bars(axes, held, colour, height=0.72, starts=left)
            handles.append(Patch(color=colour, label=name.replace("_", " ")))
        left = [start + more for start, more in zip(left, held, strict=True)]
    for row, end in enumerate(left):
        text = sizes.quantity(end * size, "bytes")
        beside(axes, text, end, row)
    name_rows(axes, [label_of(entry, shown) for entry in shown])
    axes.set_xlim(0, 1.13 * max([*left, 1e-9]))
    axes.set_xlabel(unit)
    axes.set_title(title)
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8)
    return True


def _held(entry: Entry, name: str) -> float:
    return max(0.0, entry.value(f"at_peak_{name}_bytes") or 0.0)
