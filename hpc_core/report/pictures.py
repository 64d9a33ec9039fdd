"""Charts as files: SVG, PNG and PDF. Needs Altair and vl-convert, and imports them only when something is drawn."""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_core.case.errors import MissingLibraryError, SpecError
from hpc_core.record import units
from hpc_core.record.files import write_whole
from hpc_core.record.plain import plain
from hpc_core.record.record import Record
from hpc_core.report.entry import Entry
from hpc_core.report.history import Series, summary
from hpc_core.report.terminal import caption

if TYPE_CHECKING:
    from hpc_core.report.chart_parts import Panel

_SUFFIXES = (".svg", ".png", ".pdf")
_WIDTH = 560
"""Of one panel without its labels, in points."""
_INK, _GREY = "#222222", "#666666"
_CONFIG: dict[str, Any] = {
    "font": "Liberation Sans, Arial, sans-serif",
    "view": {"stroke": None},
    "axis": {"gridColor": "#e6e8eb", "domainColor": _GREY, "tickColor": _GREY, "labelColor": _INK, "titleFontWeight": "normal"},
    "tick": {"color": _INK},
    "legend": {"columns": 5},
    "axisY": {"labelLimit": 420},
    "title": {"anchor": "start", "frame": "bounds", "fontSize": 13, "subtitleColor": _GREY, "subtitleFontSize": 10},
    "style": {
        "busy": {"color": _INK, "opacity": 0.55},
        "quiet": {"color": "#888888", "stroke": "#888888"},
        "roof": {"stroke": _INK, "color": _INK, "strokeWidth": 1.2},
        "over": {"stroke": _INK, "color": _INK},
    },
}  # fmt: skip


def require_charts() -> None:
    """Check that charts can be drawn here.

    Raises:
        MissingLibraryError: Altair or vl-convert is not installed.
    """
    if any(importlib.util.find_spec(name) is None for name in ("altair", "vl_convert")):
        raise MissingLibraryError("Charts need Altair and vl-convert: pip install 'hpc-core[report]'.")


def check_picture(path: Path) -> None:
    """Check that a picture can be written there, before anything that takes time.

    Raises:
        SpecError: the suffix is not that of a picture, or the folder does not exist.
        MissingLibraryError: Altair or vl-convert is not installed.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise SpecError(f"{path}: the suffix says what to draw; it is one of {', '.join(_SUFFIXES)}.")
    if not path.parent.is_dir():
        raise SpecError(f"{path}: there is no folder {path.parent}.")
    require_charts()


def pictures(entries: Sequence[Entry], folder: Path, kinds: Sequence[str]) -> dict[Path, bytes]:
    """Return every picture that the entries have numbers for, by its path, in each of these kinds ("svg", "png").

    The path is `<folder>/<picture>.<kind>`, or `<folder>/<machine>-<picture>.<kind>` if there are several machines.

    Raises:
        MissingLibraryError: Altair or vl-convert is not installed.
        SpecError: the folder is a file, or no entry has a number to draw.
    """
    require_charts()
    if folder.exists() and not folder.is_dir():
        raise SpecError(f"{folder}: pictures go into a folder, and this is a file.")
    from hpc_core.report.charts import PICTURES

    machines = dict.fromkeys(entry.machine for entry in entries)
    found = {}
    for machine in machines:
        own = [entry for entry in entries if entry.machine == machine and entry.metrics]
        for name, panels_of in PICTURES.items():
            panels = panels_of(own)
            for kind in kinds if panels else ():
                path = folder / f"{name if len(machines) == 1 else f'{machine}-{name}'}.{kind}"
                found[path] = picture(panels, _source(own), kind)
    if not found:
        raise SpecError(f"None of {len(entries)} cases has a number that a picture could show.")
    return found


def picture(panels: Sequence[Panel], source: str, kind: str) -> bytes:
    """Return panels below each other, with where their numbers come from, as a file of this kind: "svg", "png" or "pdf"."""
    import altair as alt
    import vl_convert

    drawn = [
        panel.chart.properties(width=_WIDTH, title={"text": textwrap.wrap(panel.title, 90) or [""]}) for panel in panels
    ]
    whole = (
        drawn[0]
        if len(drawn) == 1
        else alt.vconcat(*drawn).resolve_scale(color="independent", strokeDash="independent")
    )
    note = alt.TitleParams(text=" ", subtitle=textwrap.wrap(source, 120), orient="bottom", anchor="start")
    spec = alt.vconcat(whole, title=note, config=_CONFIG, spacing=24, background="white", padding=10).to_dict()
    if kind == "svg":
        return vl_convert.vegalite_to_svg(spec, allowed_base_urls=[]).encode()
    if kind == "png":
        return vl_convert.vegalite_to_png(spec, scale=2, allowed_base_urls=[])
    return vl_convert.vegalite_to_pdf(spec, allowed_base_urls=[])


def write_memory(record: Record, path: Path, over: Record | None = None) -> None:
    """Draw a record's memory over a step into a file of the kind that its suffix says, with the total of a second record over it.

    Raises:
        SpecError: a record without a timeline, or with other phases; the path is not that of a picture.
        MissingLibraryError: Altair or vl-convert is not installed.
    """
    check_picture(path)
    from hpc_core.report.chart_parts import Panel
    from hpc_core.report.charts_memory import memory_over_step

    chart = memory_over_step(record, over)
    around = record.circumstances
    how = "predicted" if "predicted" in around.gpu else "measured"
    peak = record.metrics.get("peak_bytes")
    rounded = "" if peak is None else f"; with the allocator's rounding {units.quantity(peak.value, peak.unit)}"
    stack = ", ".join(f"{name} {version}" for name, version in sorted(around.stack.items()))
    _write(
        path,
        Panel(plain(f"{record.case.id} on {around.machine.name}, {how}", 120), chart),
        plain(f"{stack}{rounded}", 400),
    )


def write_series(case_id: str, machine: str, each: Series, path: Path) -> None:
    """Draw a metric over sessions into a file of the kind that its suffix says.

    Raises:
        SpecError: the path is not that of a picture.
        MissingLibraryError: Altair or vl-convert is not installed.
    """
    check_picture(path)
    from hpc_core.report.chart_parts import Panel
    from hpc_core.report.charts import history

    _write(path, Panel(f"{each.metric} of {case_id}", history(each)), f"On {machine}, {summary(each)}")


def _write(path: Path, panel: Panel, source: str) -> None:
    write_whole(path, picture([panel], source, path.suffix.lower().removeprefix(".")))


def _source(entries: Sequence[Entry]) -> str:
    """Return machine and stack, and what a whisker means."""
    captions = list(dict.fromkeys(plain(caption(entry.record), 400) for entry in entries))
    more = f" (and {len(captions) - 1} more stacks or commits)" if len(captions) > 1 else ""
    predicted = "Predicted, not measured. " if entries and entries[0].is_predicted else ""
    whiskers = "Whiskers: range over processes and sessions. " if any(len(entry.past) > 1 for entry in entries) else ""
    return f"{predicted}{whiskers}{captions[0] if captions else ''}{more}"
