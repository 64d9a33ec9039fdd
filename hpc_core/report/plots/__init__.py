"""A report as pictures: the original report's four, speed against memory, roofline, memory by category, ablation.

Draws with matplotlib, which is optional, and imports it only when something is drawn. Judges nothing.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_core.errors import MissingLibraryError, SpecError
from hpc_core.report.entry import Entry
from hpc_core.report.plots.ablation import draw_ablation
from hpc_core.report.plots.bars import draw_finetune, draw_latency, draw_memory, draw_throughput
from hpc_core.report.plots.categories import draw_categories
from hpc_core.report.plots.points import draw_roofline, draw_speed_memory
from hpc_core.report.plots.style import DOTS_PER_INCH, rc, settle
from hpc_core.whole_file import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PLOTS", "draw_all"]

PLOTS: dict[str, Callable[[Figure, Sequence[Entry]], bool]] = {
    "inference-memory": draw_memory,
    "inference-latency": draw_latency,
    "inference-throughput": draw_throughput,
    "finetune": draw_finetune,
    "speed-memory": draw_speed_memory,
    "roofline": draw_roofline,
    "memory-categories": draw_categories,
    "ablation": draw_ablation,
}
"""By file name. Each fills a figure, or says False where the entries hold nothing for it."""


def draw_all(entries: Sequence[Entry], folder: Path, kinds: Sequence[str]) -> list[Path]:
    """Draw what these entries have into `<folder>/<plot>.<kind>`, for several machines `<folder>/<machine>-<plot>.<kind>`.

    All are drawn before the first is written. `kinds` are "svg" and "png".

    Raises:
        MissingLibraryError: matplotlib is not installed.
        SpecError: nothing of these entries can be drawn, or the folder is a file.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingLibraryError("Drawing needs matplotlib: pip install 'hpc-core[plots]'.")
    if folder.exists() and not folder.is_dir():
        raise SpecError(f"{folder}: pictures go into a folder, and this is a file.")
    machines = dict.fromkeys(entry.machine for entry in entries)
    drawn: dict[Path, bytes] = {}
    for machine in machines:
        own = [entry for entry in entries if entry.machine == machine and entry.metrics]
        for name, draw in PLOTS.items():
            prefix = "" if len(machines) == 1 else f"{machine}-"
            for kind, content in _drawn(draw, own, kinds).items():
                drawn[folder / f"{prefix}{name}.{kind}"] = content
    if not drawn:
        raise SpecError(f"None of {len(entries)} cases has a number that a picture could show.")
    for path, content in drawn.items():
        write_whole(path, content)
    return list(drawn)


def _drawn(
    draw: Callable[[Figure, Sequence[Entry]], bool], entries: Sequence[Entry], kinds: Sequence[str]
) -> dict[str, bytes]:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(rc()):
        figure = Figure(dpi=DOTS_PER_INCH, layout="constrained")
        if not entries or not draw(figure, entries):
            return {}
        settle(figure, entries)
        found = {}
        for kind in kinds:
            stream = io.BytesIO()
            # Without a date the same records give the same bytes.
            metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {}
            figure.savefig(stream, format=kind, metadata=metadata)
            found[kind] = stream.getvalue()
        return found
