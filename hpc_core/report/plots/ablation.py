"""What one to three changed fields do to memory and time, as factors of a base case."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hpc_core.baselines.reading import plain
from hpc_core.report.entry import Entry
from hpc_core.report.plots.style import bars, beside, colour_of, name_rows
from hpc_core.report.tradeoff import Ablation, ablations_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_ablation"]

_MOST_GROUPS = 3
_MOST_ROWS = 16


def draw_ablation(figure: Figure, entries: Sequence[Entry]) -> bool:
    """A row of panels (memory, time) for each group of cases that differ in little."""
    found = ablations_of(entries)[:_MOST_GROUPS]
    if not found:
        return False
    counts = [1 + min(_MOST_ROWS, len(each.effects)) for each in found]
    figure.set_size_inches(10.5, sum(0.85 + 0.3 * count for count in counts) + 0.5)
    panels = figure.subplots(len(found), 2, squeeze=False, height_ratios=counts, sharey="row")
    for (memory, time), each in zip(panels, found, strict=True):
        _panel(memory, each, "memory")
        _panel(time, each, "time")
    return True


def _panel(axes: Axes, ablation: Ablation, what: str) -> None:
    base, effects = ablation.base, ablation.effects[:_MOST_ROWS]
    labels = [f"{plain(base.case.partition('/')[2], 40)} (base)"]
    labels += [
        f"{plain(each.entry.case.partition('/')[2], 40)}: {plain(', '.join(each.changes), 70)}" for each in effects
    ]
    factors = [1.0, *((effect.memory if what == "memory" else effect.time) or 0.0 for effect in effects)]
    colours = [colour_of(entry) for entry in (base, *(effect.entry for effect in effects))]
    bars(axes, factors, colours, height=0.7)
    for row, factor in enumerate(factors):
        beside(axes, f"{factor:.3g}" if factor else "-", factor, row)
    axes.axvline(1.0, color="#666666", linewidth=0.8, linestyle="--")
    axes.set_xlim(0, 1.15 * max([*factors, 1.0]))
    name = "peak memory" if what == "memory" else (ablation.time_metric or "time")
    axes.set_xlabel(f"{name}, times the base's")
    if what == "memory":
        name_rows(axes, labels)
        many = len(ablation.effects)
        cut = f" (the first {_MOST_ROWS} of {many} cases)" if many > _MOST_ROWS else ""
        axes.set_title(f"Ablation of {plain(base.case, 60)}{cut}", fontsize=9)
