"""Bars: the original report's pictures of inference (memory, latency, throughput) and of fine-tuning (time and memory)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hpc_core.record import units as sizes
from hpc_core.report.entry import BUSY, Entry
from hpc_core.report.memory_unit import peak_unit
from hpc_core.report.plots.style import (
    INK,
    bars,
    beside,
    colour_of,
    label_of,
    legend_of,
    most,
    name_rows,
    whisker,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_finetune", "draw_latency", "draw_memory", "draw_throughput"]

_ROW_INCHES = 0.3
_REST_INCHES = 1.35
_WIDTH_INCHES = 7.5


def draw_memory(figure: Figure, entries: Sequence[Entry]) -> bool:
    """Peak memory of generation."""
    size, unit = peak_unit(each for each in entries if each.record.case.kind == "generate")
    return _alone(figure, entries, "Inference: peak memory", f"{unit} allocated by tensors", ("peak_bytes",), size)


def draw_throughput(figure: Figure, entries: Sequence[Entry]) -> bool:
    """New tokens a second, prefill included."""
    title, unit = "Inference: throughput", "new tokens a second of wall time, prefill included"
    return _alone(figure, entries, title, unit, ("tokens_per_s",), 1.0)


def draw_latency(figure: Figure, entries: Sequence[Entry]) -> bool:
    """Wall time of a decoded token, and within it the time that the GPU was busy."""
    title, unit = "Inference: latency", "ms a decoded token: wall time, and dark what the GPU was busy"
    return _alone(figure, entries, title, unit, ("decode_token_s", *BUSY), 1e-3, inner=("busy_decode_token_s",))


def _alone(
    figure: Figure,
    entries: Sequence[Entry],
    title: str,
    unit: str,
    names: Sequence[str],
    scale: float,
    inner: Sequence[str] = (),
) -> bool:
    chosen = [each for each in entries if each.record.case.kind == "generate" and each.value(*names) is not None]
    if not chosen:
        return False
    shown, told = most(chosen, title)
    figure.set_size_inches(_WIDTH_INCHES, _REST_INCHES + _ROW_INCHES * len(shown))
    axes = figure.add_subplot()
    _bars(axes, shown, names, scale, inner)
    name_rows(axes, [label_of(entry, shown) for entry in shown])
    axes.set_title(told)
    axes.set_xlabel(unit)
    legend_of(figure, shown)
    return True


def draw_finetune(figure: Figure, entries: Sequence[Entry]) -> bool:
    """Time and memory of a training step, side by side."""
    chosen = [each for each in entries if each.record.case.kind == "finetune" and each.value("peak_bytes") is not None]
    if not chosen:
        return False
    shown, told = most(chosen, "Fine-tuning")
    timed = any(each.value("step_s") is not None for each in shown)
    figure.set_size_inches(9.0, _REST_INCHES + _ROW_INCHES * len(shown))
    panels = figure.subplots(1, 2 if timed else 1, sharey=True, squeeze=False)[0]
    if timed:
        _bars(panels[0], shown, ("step_s",), 1e-3, ("busy_s",))
        panels[0].set_title("Time of a step")
        panels[0].set_xlabel("ms: wall time, and dark what the GPU was busy")
    size, unit = peak_unit(shown)
    _bars(panels[-1], shown, ("peak_bytes",), size, ())
    name_rows(panels[0], [label_of(entry, shown) for entry in shown])
    panels[-1].set_title("Peak memory")
    # Above both panels: the count of cases that are left out is too long for either.
    figure.suptitle(told, fontsize=10, weight="bold", x=0.01, ha="left")
    panels[-1].set_xlabel(f"{unit} allocated by tensors")
    legend_of(figure, shown)
    return True


def _bars(axes: Axes, entries: Sequence[Entry], names: Sequence[str], scale: float, inner: Sequence[str]) -> None:
    """A bar an entry from the top down, its value written beside it; `inner` metrics as a thinner, darker bar within."""
    values = [(entry.value(*names) or 0.0) / scale for entry in entries]
    bars(axes, values, [colour_of(entry) for entry in entries], height=0.7)
    busy = [(entry.value(*inner) or 0.0) / scale if inner else 0.0 for entry in entries]
    if any(busy):
        bars(axes, busy, INK, height=0.28, alpha=0.55)
    ends = list(values)
    for row, entry in enumerate(entries):
        spread = entry.spread(*names)
        if whisker(axes, spread, row, scale) and spread is not None:
            ends[row] = max(ends[row], spread.high / scale)
        beside(axes, _text(entry, names), ends[row], row)
    axes.set_xlim(0, 1.33 * max([*ends, 1e-9]))


def _text(entry: Entry, names: Sequence[str]) -> str:
    name = entry.name_of(*names)
    if name is None:
        return "-"
    metric = entry.metrics[name]
    if metric.unit == "tokens/s":
        return f"{metric.value:,.4g}" if metric.value < 1000 else f"{metric.value:,.0f}"
    return sizes.quantity(metric.value, metric.unit)
