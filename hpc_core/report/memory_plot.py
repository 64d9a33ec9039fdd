"""Memory over a step as a picture: what was predicted or measured, by category, and a second record's total over it.

Draws with matplotlib, which is optional, and imports it only when something is drawn.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_core.case.errors import MissingLibraryError, SpecError
from hpc_core.record import units as sizes
from hpc_core.record.record import MemoryTimeline, Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["CATEGORY_COLOURS", "check_plot", "draw_memory"]

_SUFFIXES = (".svg", ".png", ".pdf")
# Okabe and Ito's colours, which people with any colour blindness can tell apart.
CATEGORY_COLOURS = {
    "weights": "#0072B2",
    "adapter": "#56B4E9",
    "gradients": "#E69F00",
    "optimizer": "#CC79A7",
    "kv_cache": "#F0E442",
    "activations": "#009E73",
    "temporaries": "#D55E00",
    "other": "#999999",
}
_INCHES = (9.0, 5.0)
_DOTS_PER_INCH = 150
_STACK = ("torch", "transformers", "peft", "bitsandbytes")
_NEAR = 0.6
"""A card's memory is drawn where the peak takes so much of it; a line far above would flatten everything else."""


def check_plot(path: Path) -> None:
    """Whether a picture can be drawn there, asked before anything that takes time.

    Raises:
        SpecError: a suffix that is no picture's, or no such folder.
        MissingLibraryError: matplotlib is not installed.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise SpecError(f"{path}: say what to draw by its suffix: {', '.join(_SUFFIXES)}.")
    if not path.parent.is_dir():
        raise SpecError(f"{path}: there is no folder {path.parent}.")
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingLibraryError("Drawing needs matplotlib: pip install 'hpc-core[plots]'.")


def draw_memory(record: Record, path: Path, over: Record | None = None) -> None:
    """Draw the record's timeline, stacked by category, into a file of the kind that its suffix says.

    `over` is a second record of the same step, a measured one over a prediction: its total becomes a line. Its events are
    stretched phase by phase, since two recorders do not count alike.

    Raises:
        SpecError: a record without timeline, or with other phases; a path that is no picture's.
        MissingLibraryError: matplotlib is not installed.
    """
    check_plot(path)
    timeline = _timeline(record)
    other = None if over is None else _timeline(over)
    if other is not None and other.phases != timeline.phases:
        raise SpecError(f"{over and over.case.id} has the phases {other.phases}, {record.case.id} {timeline.phases}.")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "hpc-core", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=_INCHES, dpi=_DOTS_PER_INCH, layout="constrained")
        axes = figure.add_subplot()
        unit_bytes, unit = _unit(max(timeline.totals))
        _stack(axes, timeline, unit_bytes)
        if over is not None and other is not None:
            _line(axes, timeline, over, other, unit_bytes)
        _mark_phases(axes, timeline)
        _mark_peak(axes, record, timeline, unit_bytes)
        axes.set_xlabel(f"allocations and frees since the step began\n\n{_how(record)}")
        axes.set_ylabel(f"memory of tensors and scratch, {unit}")
        axes.set_title(_what(record), fontsize=10, loc="left", pad=18)
        figure.legend(loc="outside right upper", reverse=True, frameon=False)
        date: dict[str, Any] = {"Date": None} if path.suffix.lower() == ".svg" else {}
        figure.savefig(path, metadata=date)


def _timeline(record: Record) -> MemoryTimeline:
    if record.timeline is None or not record.timeline.events:
        raise SpecError(f"The record of {record.case.id} holds no timeline: make it with --timeline.")
    return record.timeline


def _unit(most: int) -> tuple[int, str]:
    return (2**30, "GiB") if most >= 2**30 else (2**20, "MiB")


def _stack(axes: Axes, timeline: MemoryTimeline, unit_bytes: int) -> None:
    names = [name for name in CATEGORY_COLOURS if name in timeline.bytes_by_category]
    columns = [[value / unit_bytes for value in timeline.bytes_by_category[name]] for name in names]
    colours = [CATEGORY_COLOURS[name] for name in names]
    labels = [name.replace("_", " ") for name in names]
    axes.stackplot(timeline.events, *columns, labels=labels, colors=colours, step="post", linewidth=0)
    axes.set_xlim(timeline.events[0], max(timeline.events[-1], timeline.events[0] + 1))
    axes.set_ylim(0, 1.12 * max(timeline.totals) / unit_bytes)
    axes.spines[["top", "right"]].set_visible(False)


def _line(axes: Axes, timeline: MemoryTimeline, over: Record, other: MemoryTimeline, unit_bytes: int) -> None:
    ours, theirs = _extents(timeline), _extents(other)
    events = []
    for event, phase in zip(other.events, other.phase, strict=True):
        begin, end = ours.get(phase, (timeline.events[0], timeline.events[0]))
        first, last = theirs[phase]
        events.append(begin + (end - begin) * (event - first) / max(last - first, 1))
    totals = [total / unit_bytes for total in other.totals]
    axes.plot(events, totals, color="black", linewidth=1, drawstyle="steps-post", label=f"{_kind(over)}, total")
    axes.set_ylim(0, max(axes.get_ylim()[1], 1.12 * max(totals)))


def _extents(timeline: MemoryTimeline) -> dict[int, tuple[int, int]]:
    """First and last event of each phase; a phase ends where the next begins."""
    firsts = {phase: event for event, phase in reversed(list(zip(timeline.events, timeline.phase, strict=True)))}
    ends = [*list(firsts.values())[-2::-1], timeline.events[-1]]
    return {phase: (firsts[phase], end) for phase, end in zip(sorted(firsts), ends, strict=True)}


def _mark_phases(axes: Axes, timeline: MemoryTimeline) -> None:
    for phase, (begin, end) in _extents(timeline).items():
        if phase < 0:
            continue
        axes.axvline(begin, color="black", linewidth=0.6, linestyle=":")
        axes.annotate(
            timeline.phases[phase],
            ((begin + end) / 2, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
        )


def _mark_peak(axes: Axes, record: Record, timeline: MemoryTimeline, unit_bytes: int) -> None:
    totals, memory = timeline.totals, record.circumstances.machine.memory_bytes
    top = max(totals)
    at = totals.index(top)
    right = timeline.events[at] > (timeline.events[0] + timeline.events[-1]) / 2
    axes.annotate(
        f"peak {sizes.quantity(top, 'bytes')}",
        (timeline.events[at], top / unit_bytes),
        xytext=(-10 if right else 10, 8),
        textcoords="offset points",
        ha="right" if right else "left",
        arrowprops={"arrowstyle": "-", "linewidth": 0.6},
    )
    if top > _NEAR * memory:
        axes.axhline(memory / unit_bytes, color="black", linewidth=0.8, linestyle="--", label="the card's memory")
        axes.set_ylim(0, max(axes.get_ylim()[1], 1.05 * memory / unit_bytes))


def _kind(record: Record) -> str:
    return "predicted" if "predicted" in record.circumstances.gpu else "measured"


def _what(record: Record) -> str:
    return f"{record.case.id} on {record.circumstances.machine.name}, {_kind(record)}"


def _how(record: Record) -> str:
    stack = record.circumstances.stack
    versions = ", ".join(f"{name} {stack[name]}" for name in _STACK if name in stack)
    peak = record.metrics.get("peak_bytes")
    rounded = "" if peak is None else f"; with the allocator's rounding {sizes.quantity(peak.value, peak.unit)}"
    return f"{versions}{rounded}"
