"""From stock to tuned as a picture: what each thing more does to time and memory.

    python -m bench.studies.ablations.chart bench/studies/ablations/train-steps-h100.json bench/studies/ablations/steps-qlora.svg --only qlora
    python -m bench.studies.ablations.chart bench/studies/ablations/decode-ablation-h200.json bench/studies/ablations/steps-decode.svg

Draws what the ablations of `bench/` wrote, and nothing else; needs matplotlib.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.studies.ablations.ladder import Ladder, Step, read_ladders
from hpc_core.baselines.reading import plain
from hpc_core.case.errors import SpecError
from hpc_core.record.files import write_whole
from hpc_core.report.plots.style import DOTS_PER_INCH, INK, beside, rc

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_steps", "drawn_steps"]

_STOCK, _TUNED = "#999999", "#0072B2"  # of Okabe and Ito's palette, as in `style`
_KINDS = ("svg", "png")
_LEAST = 1e-9
_ROOM = 1.9
"""How far the axis of time goes on behind its longest bar, for what is written there."""


def drawn_steps(source: str, ladders: Sequence[Ladder], kind: str) -> bytes:
    """The picture as a file of this kind, "svg" or "png". `source`: machine, stack and day, for the caption."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(rc()):
        figure = Figure(dpi=DOTS_PER_INCH, layout="constrained")
        draw_steps(figure, source, ladders)
        stream = io.BytesIO()
        metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {}  # the same rows give the same bytes
        figure.savefig(stream, format=kind, metadata=metadata)
        return stream.getvalue()


def draw_steps(figure: Figure, source: str, ladders: Sequence[Ladder]) -> None:
    """Two panels a ladder, time and memory side by side, a bar a step from the top down."""
    counts = [len(each.steps) for each in ladders]
    figure.set_size_inches(10.0, sum(0.9 + 0.36 * count for count in counts) + 0.5)
    panels = figure.subplots(
        len(ladders),
        2,
        squeeze=False,
        height_ratios=[1.5 + count for count in counts],
        width_ratios=[1.5, 1],
        sharey="row",
    )
    for (time, memory), ladder in zip(panels, ladders, strict=True):
        _time(time, ladder)
        _memory(memory, ladder)
    letters = int(figure.get_figwidth() * 17)
    figure.supxlabel(textwrap.fill(plain(source, 400), letters), fontsize=7, color="#666666", x=0.01, ha="left")


def _time(axes: Axes, ladder: Ladder) -> None:
    """Wall time, and within it, thinner and darker, what the GPU was busy."""
    walls = [step.wall_ms or 0.0 for step in ladder.steps]
    busy = [step.busy_ms or 0.0 for step in ladder.steps]
    _bars(axes, walls)
    axes.barh(range(len(busy)), busy, color=INK, alpha=0.55, height=0.28)
    for row, step in enumerate(ladder.steps):
        beside(axes, _time_text(step), max(walls[row], busy[row]), row)
    _frame(axes, ladder, [max(pair) for pair in zip(walls, busy, strict=True)], room=_ROOM)
    axes.set_title(plain(ladder.title, 80))
    axes.set_xlabel(f"ms a {plain(ladder.per, 20)}: wall time, and dark what the GPU was busy")


def _memory(axes: Axes, ladder: Ladder) -> None:
    peaks = [step.peak_gib or 0.0 for step in ladder.steps]
    _bars(axes, peaks)
    for row, step in enumerate(ladder.steps):
        beside(axes, "-" if step.peak_gib is None else f"{step.peak_gib:.2f}", peaks[row], row)
    _frame(axes, ladder, peaks, room=1.2)
    axes.set_title("peak memory")
    axes.set_xlabel("GiB, a graph's pool included")


def _bars(axes: Axes, values: Sequence[float]) -> None:
    colours = [_STOCK, *[_TUNED] * (len(values) - 1)]
    axes.barh(range(len(values)), values, color=colours[: len(values)], height=0.7)


def _frame(axes: Axes, ladder: Ladder, ends: Sequence[float], *, room: float) -> None:
    axes.set_yticks(range(len(ladder.steps)), [plain(step.label, 60) for step in ladder.steps])
    axes.set_ylim(len(ladder.steps) - 0.45, -0.55)
    axes.set_xlim(0, room * max([*ends, _LEAST]))
    axes.tick_params(axis="y", length=0)


def _time_text(step: Step) -> str:
    """As "225.3, busy 91.0", with tokens a second where the row has them; a row without a number says why."""
    if step.wall_ms is None:
        return f"no number: {plain((step.error or 'not measured').partition(':')[0][:40], 40)}"
    digits = 1 if step.wall_ms >= 20 else 2
    busy = "" if step.busy_ms is None else f", busy {step.busy_ms:.{digits}f}"
    rate = "" if step.tokens_per_s is None else f" ({step.tokens_per_s:,.0f} tokens/s)"
    return f"{step.wall_ms:.{digits}f}{busy}{rate}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw one file into another; 2 where the rows cannot be read or the picture cannot be written."""
    ask = argparse.ArgumentParser(prog="python -m bench.studies.ablations.chart", description=__doc__.splitlines()[0])
    ask.add_argument("rows", type=Path, help="what an ablation of bench/ wrote")
    ask.add_argument("picture", type=Path, help="a file ending in .svg or .png")
    ask.add_argument("--only", action="append", default=[], metavar="GROUP", help="one group of rows; repeatable")
    chosen = ask.parse_args(arguments)
    kind = chosen.picture.suffix.removeprefix(".")
    if kind not in _KINDS:
        ask.error(f"{chosen.picture}: a picture ends in .svg or .png.")
    try:
        source, ladders = read_ladders(chosen.rows, chosen.only)
    except SpecError as error:
        ask.error(str(error))
    if importlib.util.find_spec("matplotlib") is None:
        ask.error("drawing needs matplotlib: pip install 'hpc-core[plots]'.")
    drawn = drawn_steps(source, ladders, kind)
    try:
        write_whole(chosen.picture, drawn)
    except OSError as error:
        ask.error(f"{chosen.picture}: cannot be written ({error.strerror}).")
    return 0


if __name__ == "__main__":
    sys.exit(main())
