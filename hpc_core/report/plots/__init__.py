"""A report as pictures: the original report's four, speed against memory, roofline, memory by category, ablation.

Draws with matplotlib, which is optional, and imports it only when something is drawn. Judges nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hpc_core.report.entry import Entry
from hpc_core.report.plots.drawing import PLOTS, Drawing
from hpc_core.whole_file import write_whole

__all__ = ["PLOTS", "Drawing", "draw_all"]


def draw_all(entries: Sequence[Entry], folder: Path, kinds: Sequence[str]) -> list[Path]:
    """Draw what these entries have into the folder, in this process; see `Drawing`. All are drawn before the first is written.

    Raises:
        MissingLibraryError: matplotlib is not installed.
        SpecError: nothing of these entries can be drawn, or the folder is a file.
    """
    with Drawing(entries, folder, kinds) as drawing:
        drawn = drawing.contents()
    for path, content in drawn.items():
        write_whole(path, content)
    return list(drawn)
