"""A metric over sessions as a picture: values, the levels between change points, what moved there.

Draws with matplotlib, which is optional, and imports it only when something is drawn.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from statistics import median
from typing import Any

from hpc_core.report.memory_plot import check_plot
from hpc_core.report.over_time import Series, said, summary

__all__ = ["draw_series"]

_INCHES = (9.0, 4.5)
_DOTS_PER_INCH = 150
_BLUE, _RED = "#0072B2", "#D55E00"
_MOST_TICKS = 12


def draw_series(case_id: str, key: str, each: Series, path: Path) -> None:
    """Draw values over sessions, with the levels between change points, into a file of the kind that its suffix says.

    Raises:
        SpecError: a path that is no picture's.
        MissingLibraryError: matplotlib is not installed.
    """
    check_plot(path)
    import matplotlib as mpl
    from matplotlib.figure import Figure

    size, unit = _scale(each)
    with mpl.rc_context({"svg.hashsalt": "hpc-core", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=_INCHES, dpi=_DOTS_PER_INCH, layout="constrained")
        axes = figure.add_subplot()
        axes.plot(range(len(each.values)), [value / size for value in each.values], "o", color=_BLUE, markersize=4)
        edges = [0, *(change.index for change in each.changes), len(each.values)]
        for begin, end in itertools.pairwise(edges):
            level = median(each.values[begin:end]) / size
            axes.plot([begin - 0.4, end - 0.6], [level, level], color=_BLUE, linewidth=1)
        for change in each.changes:
            axes.axvline(change.index - 0.5, color=_RED, linewidth=0.8, linestyle="--")
            axes.annotate(
                said(each, change).partition(";")[0],
                (change.index - 0.5, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(3, -10),
                textcoords="offset points",
                color=_RED,
                fontsize=8,
            )
        _label(axes, case_id, key, each, unit)
        date: dict[str, Any] = {"Date": None} if path.suffix.lower() == ".svg" else {}
        figure.savefig(path, metadata=date)


def _label(axes: Any, case_id: str, key: str, each: Series, unit: str) -> None:
    many = len(each.points)
    shown = range(0, many, max(1, -(-many // _MOST_TICKS)))
    ticks = [f"{each.points[index].at[:10]}\n{(each.points[index].commit or '')[:7]}" for index in shown]
    axes.set_xticks(list(shown), ticks, fontsize=7)
    axes.set_xlim(-0.6, many - 0.4)
    axes.set_ylabel(f"{each.metric}, {unit}" if unit else each.metric)
    axes.set_title(f"{each.metric} of {case_id} on {key}, {summary(each)}", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.ticklabel_format(axis="y", useOffset=False)


def _scale(each: Series) -> tuple[float, str]:
    largest = max(abs(value) for value in each.values)
    if each.unit == "bytes":
        return (2.0**30, "GiB") if largest >= 2**30 else (2.0**20, "MiB")
    if each.unit == "s":
        return (1.0, "s") if largest >= 1 else (1e-3, "ms")
    return 1.0, "" if each.unit == "1" else each.unit
