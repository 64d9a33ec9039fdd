"""Draw the steps from stock to tuned: what each change does to time and memory.

    python -m bench.studies.ablations.chart bench/studies/ablations/train-steps-h100.json bench/studies/ablations/steps-qlora.svg --only qlora
    python -m bench.studies.ablations.chart bench/studies/ablations/decode-ablation-h200.json bench/studies/ablations/steps-decode.svg

Reads the files that the ablations of `bench/` write; needs `hpc-core[report]`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.studies.ablations.ladder import Ladder, Step, read_ladders
from hpc_core.case.errors import SpecError
from hpc_core.record.files import write_whole
from hpc_core.record.plain import plain
from hpc_core.report.chart_parts import Panel, bar_panel
from hpc_core.report.pictures import picture

_COLOURS = {"stock": "#999999", "tuned": "#0072B2"}  # of Okabe and Ito's palette
_KINDS = ("svg", "png")


def drawn_steps(source: str, ladders: Sequence[Ladder], kind: str) -> bytes:
    """Return the picture as a file of this kind, "svg" or "png". `source` names machine, stack and date."""
    return picture(
        [panel for ladder in ladders for panel in (_time(ladder), _memory(ladder))], plain(source, 400), kind
    )


def _time(ladder: Ladder) -> Panel:
    rows = [
        _row(step, step.wall_ms, _time_text(step)) | ({} if step.busy_ms is None else {"busy": step.busy_ms})
        for step in ladder.steps
    ]
    unit = f"ms per {plain(ladder.per, 20)}: wall time; dark: GPU-busy"
    return bar_panel(plain(ladder.title, 80), unit, _grouped(rows), _COLOURS, room=1.7)


def _memory(ladder: Ladder) -> Panel:
    rows = [
        _row(step, step.peak_gib, "-" if step.peak_gib is None else f"{step.peak_gib:.2f}") for step in ladder.steps
    ]
    title = f"{plain(ladder.title, 80)}: peak memory"
    return bar_panel(title, "GiB, a graph's pool included", _grouped(rows), _COLOURS)


def _row(step: Step, value: float | None, text: str) -> dict[str, Any]:
    return {"case": plain(step.label, 60), "value": value or 0.0, "text": text}


def _grouped(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with the colour of each: the first one is stock."""
    return [row | {"group": "tuned" if index else "stock"} for index, row in enumerate(rows)]


def _time_text(step: Step) -> str:
    """Return such as "225.3, busy 91.0", with tokens per second if the row has them; a row without a number says why."""
    if step.wall_ms is None:
        return f"no number: {plain((step.error or 'not measured').partition(':')[0][:40], 40)}"
    digits = 1 if step.wall_ms >= 20 else 2
    busy = "" if step.busy_ms is None else f", busy {step.busy_ms:.{digits}f}"
    rate = "" if step.tokens_per_s is None else f" ({step.tokens_per_s:,.0f} tokens/s)"
    return f"{step.wall_ms:.{digits}f}{busy}{rate}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw one file into another; return 2 if the rows cannot be read or the picture cannot be written."""
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
    drawn = drawn_steps(source, ladders, kind)
    try:
        write_whole(chosen.picture, drawn)
    except OSError as error:
        ask.error(f"{chosen.picture}: cannot be written ({error.strerror}).")
    return 0


if __name__ == "__main__":
    sys.exit(main())
