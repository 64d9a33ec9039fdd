"""How all pictures of a report look: colours that everybody can tell apart, units, and the caption that names machine and stack."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from hpc_core.baselines.reading import plain
from hpc_core.report.entry import Entry, Spread
from hpc_core.report.terminal import caption

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "DOTS_PER_INCH",
    "INK",
    "bars",
    "beside",
    "colour_of",
    "label_of",
    "legend_of",
    "most",
    "name_rows",
    "plain_log",
    "rc",
    "settle",
    "whisker",
]

DOTS_PER_INCH = 150
INK = "#222222"
_GREY = "#666666"
MOST_CASES = 30
# Okabe and Ito's colours, which people with any colour blindness can tell apart.
_COLOURS = {
    "unquantized": "#0072B2",
    "4 bit": "#D55E00",
    "int8": "#009E73",
    "full": "#CC79A7",
    "LoRA": "#56B4E9",
    "QLoRA": "#E69F00",
    "own step": "#999999",
}
_MOST_LETTERS = 40
_WIDE = 1e3
"""From so many times on, an axis has ticks at whole powers of ten only."""


def rc() -> Any:  # a dict whose keys matplotlib names one by one
    """matplotlib's settings: text stays text in an SVG, ids are the same in each run."""
    return {
        "svg.hashsalt": "hpc-core",
        "svg.fonttype": "none",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": _GREY,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "text.parse_math": False,
    }


def family_of(entry: Entry) -> str:
    """How it is quantized or trained, which is what colours tell apart."""
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


def colour_of(entry: Entry) -> str:
    """The colour of its family."""
    return _COLOURS[family_of(entry)]


def legend_of(figure: Figure, entries: Iterable[Entry]) -> None:
    """A legend of the families that are there, where there are several; beside the axes, so that it hides nothing."""
    from matplotlib.patches import Patch

    families = set(map(family_of, entries))
    if len(families) > 1:
        handles = [Patch(color=_COLOURS[name], label=name) for name in _COLOURS if name in families]
        figure.legend(handles=handles, frameon=False, fontsize=8, loc="outside right upper")


def plain_log(axes: Axes, *, x: bool = False, y: bool = False) -> None:
    """Logarithmic axes whose ticks are plain numbers, without the markup that matplotlib would set powers in."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    for axis, is_log in ((axes.xaxis, x), (axes.yaxis, y)):
        if is_log:
            low, high = sorted(axis.get_view_interval())
            is_wide = low <= 0 or high / low > _WIDE
            axis.set_major_locator(LogLocator(subs=(1.0,) if is_wide else (1.0, 2.0, 5.0), numticks=9))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}" if value < 1e6 else f"{value:.0e}"))
            axis.set_minor_formatter(NullFormatter())
            if not is_wide:  # 2 and 5 have ticks with numbers already
                axis.set_minor_locator(NullLocator())


def label_of(entry: Entry, among: Sequence[Entry]) -> str:
    """The variant alone where all are of one model."""
    shapes = {each.case.partition("/")[0] for each in among}
    text = entry.case if len(shapes) > 1 else entry.case.partition("/")[2]
    return plain(text, _MOST_LETTERS)


def most(entries: Sequence[Entry], what: str) -> tuple[list[Entry], str]:
    """As many as a picture can hold, and its title."""
    shown = list(entries[:MOST_CASES])
    cut = f" (the first {len(shown)} of {len(entries)} cases)" if len(shown) < len(entries) else ""
    return shown, f"{what}{cut}"


def bars(
    axes: Axes,
    widths: Sequence[float],
    colours: Sequence[str] | str,
    *,
    height: float,
    starts: Sequence[float] | None = None,
    alpha: float = 1.0,
) -> None:
    """Horizontal bars at rows 0, 1, 2 and so on, as one artist: matplotlib spends most of its time on the number of them."""
    from matplotlib.collections import PolyCollection

    half = height / 2
    boxes = [
        [(left, row - half), (left, row + half), (left + width, row + half), (left + width, row - half)]
        for row, (left, width) in enumerate(zip(starts or [0.0] * len(widths), widths, strict=True))
    ]
    drawn = PolyCollection(boxes, facecolors=colours, edgecolors="none", alpha=alpha)
    drawn.set_in_layout(False)  # they lie within the axes
    axes.add_collection(drawn, autolim=False)


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """A name left of each row, the first on top. Plain texts: a tick is five artists, of which four are invisible here."""
    axes.set_yticks([])
    axes.set_ylim(len(names) - 0.45, -0.55)
    for row, name in enumerate(names):
        axes.text(-0.012, row, name, transform=axes.get_yaxis_transform(), ha="right", va="center")


def beside(axes: Axes, text: str, at: float, row: float) -> None:
    """A value at the end of its bar."""
    from matplotlib.transforms import ScaledTranslation

    five_points = ScaledTranslation(5 / 72, 0, axes.figure.dpi_scale_trans)
    note = axes.text(at, row, text, transform=axes.transData + five_points, va="center", fontsize=8)
    note.set_in_layout(False)  # the axes leave it room, and a layout that measures each text takes twice the time


def whisker(axes: Axes, spread: Spread | None, at: float, scale: float) -> bool:
    """The range over processes and sessions as a horizontal whisker; whether there was one."""
    if spread is None or not spread.high > spread.low:
        return False
    low, high = spread.low / scale, spread.high / scale
    axes.errorbar(
        [(low + high) / 2], [at], xerr=[[(high - low) / 2], [(high - low) / 2]], color=INK, capsize=2.5, linewidth=1
    )
    return True


def settle(figure: Figure, entries: Sequence[Entry]) -> None:
    """Add the caption and place everything, once: nothing moves afterwards, and a second call does nothing.

    matplotlib itself would lay the figure out and draw it invisibly before each file that it writes.
    """
    engine = figure.get_layout_engine()
    if engine is None:
        return
    _add_caption(figure, entries)
    engine.execute(figure)
    figure.set_layout_engine(None)


def _add_caption(figure: Figure, entries: Sequence[Entry]) -> None:
    """Machine and stack below everything, and what a whisker means where one is drawn."""
    from matplotlib.container import ErrorbarContainer

    captions = list(dict.fromkeys(plain(caption(entry.record), 400) for entry in entries))
    more = f" (and {len(captions) - 1} more stacks or commits)" if len(captions) > 1 else ""
    is_ranged = any(isinstance(each, ErrorbarContainer) for axes in figure.axes for each in axes.containers)
    whiskers = "Whiskers: range over processes and sessions. " if is_ranged else ""
    predicted = "Predicted, not measured. " if entries[0].is_predicted else ""
    letters = int(figure.get_figwidth() * 17)
    figure.supxlabel(
        textwrap.fill(f"{predicted}{whiskers}{captions[0]}{more}", letters), fontsize=7, color=_GREY, x=0.01, ha="left"
    )
