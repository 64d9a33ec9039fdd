"""`hpc-core report RECORDS…`: what records say, for a terminal, a pull request, a browser, a spreadsheet. Measures nothing."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import typer

from hpc_core.baselines.reading import plain, read_records
from hpc_core.case.errors import MissingLibraryError, SpecError
from hpc_core.cli.console import say, tell
from hpc_core.instruments.garbage import uncollected
from hpc_core.record.files import write_whole
from hpc_core.report import render
from hpc_core.report.entry import Entry, entries_of

if TYPE_CHECKING:
    from hpc_core.report.plots import Drawing

__all__ = ["report"]

_SUMMARY = "GITHUB_STEP_SUMMARY"
_MOST_PROCESSES = 4
"""That draw: eight pictures take two seconds of one core."""


def report(
    records: Annotated[
        list[Path],
        typer.Argument(
            help="Record files, folders of them, a run's --benchmark-json, or folders of baselines with their histories."
        ),
    ],
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write Markdown for a pull request.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write every metric of every record.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Draw pictures into this folder.")] = None,
    plot_format: Annotated[Literal["svg", "png", "both"], typer.Option(help="What the pictures are.")] = "svg",
    baselines: Annotated[
        Path | None, typer.Option("--baselines", help="Judge by this folder of baselines; else nothing is judged.")
    ] = None,
    case: Annotated[list[str] | None, typer.Option(help="Only these cases, globs over whole ids; repeatable.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Verdicts and metrics as JSON, instead of the table.")
    ] = False,
) -> None:
    """Show records: as a table here, and as the files asked for. Exit code 0 whatever they say, 2: they cannot be read."""
    if baselines is not None and not baselines.is_dir():
        raise SpecError(f"{baselines}: no such folder of baselines. Leave --baselines out to judge nothing.")
    for option, path in (("--html", html), ("--markdown", markdown), ("--csv", csv)):
        if path is not None and path.is_dir():
            raise SpecError(f"{path}: is a folder, and {option} names the file that is to be written.")
    # Whatever can fail comes before the first file is written.
    with contextlib.ExitStack() as until_drawn:
        with uncollected():
            read = read_records(records)
            chosen = [
                each for each in read.records if not case or any(fnmatchcase(each.case.id, glob) for glob in case)
            ]
            if not chosen:
                raise SpecError(
                    f"None of {len(read.records)} records is of a case that matches {', '.join(case or ())}."
                )
            entries = entries_of(chosen, baselines)
            pictures = None if plots is None else until_drawn.enter_context(_drawing(entries, plots, plot_format))
            files = _texts(entries, read.notes, html=html, markdown=markdown, csv=csv)
        drawn = {} if pictures is None else pictures.contents()
    for path, text in files:
        write_whole(path, text.encode(errors="replace"))
    for path, content in drawn.items():
        write_whole(path, content)
    say(_as_json(entries, read.notes) if as_json else _table(entries))
    for note in read.notes:
        tell(f"note: {note}")
    for path in [*(path for path, _ in files), *drawn]:
        tell(f"wrote {path}")


def _texts(
    entries: Sequence[Entry], notes: Sequence[str], *, html: Path | None, markdown: Path | None, csv: Path | None
) -> list[tuple[Path, str]]:
    """What to write where; also appends the Markdown to the summary of a GitHub job, where this runs in one.

    Raises:
        MissingLibraryError: a page is asked for and jinja2 is not installed.
    """
    found = []
    if html is not None:
        found.append((html, _page(entries, notes)))
    summary = os.environ.get(_SUMMARY, "")
    if markdown is not None or summary:
        from hpc_core.report.markdown import markdown as as_markdown

        text = as_markdown(entries, notes)
        if markdown is not None:
            found.append((markdown, text))
        if summary:
            with Path(summary).open("a", encoding="utf-8", errors="replace") as file:
                file.write(f"{text}\n")
    if csv is not None:
        from hpc_core.report.records_csv import records_csv

        found.append((csv, records_csv(entries)))
    return found


def _page(entries: Sequence[Entry], notes: Sequence[str]) -> str:
    try:
        from hpc_core.report.page import page
    except ModuleNotFoundError as error:
        if error.name not in ("jinja2", "markupsafe"):
            raise
        raise MissingLibraryError("A page needs jinja2: pip install 'hpc-core[pages]'.") from error
    return page(entries, notes)


def _drawing(entries: Sequence[Entry], folder: Path, kind: Literal["svg", "png", "both"]) -> Drawing:
    """Pictures that other processes draw, where there is a second core, while this one writes texts. They end with this one, however it ends."""
    from hpc_core.launch.supervisor import die_with
    from hpc_core.report.plots import Drawing

    processes = min(_MOST_PROCESSES, len(os.sched_getaffinity(0)))
    kinds = ("svg", "png") if kind == "both" else (kind,)
    return Drawing(entries, folder, kinds, processes=processes, begin=partial(die_with, os.getpid()))


def _table(entries: Sequence[Entry]) -> str:
    width = shutil.get_terminal_size().columns
    return render([entry.row for entry in entries], width=width, color=sys.stdout.isatty())


def _as_json(entries: Sequence[Entry], notes: Sequence[str]) -> str:
    told: dict[str, Any] = {"cases": [_entry(entry) for entry in entries], "notes": list(notes)}
    return msgspec.json.format(msgspec.json.encode(told), indent=2).decode()


def _entry(entry: Entry) -> dict[str, Any]:
    judgement = entry.judgement
    return {
        "case": entry.case,
        "machine": entry.machine,
        "status": entry.record.status,
        "verdict": entry.row.verdict,
        "headline": "" if judgement is None else plain(judgement.headline, 300),
        "cause": None if entry.cause is None else msgspec.to_builtins(entry.cause),
        "sessions": len(entry.past),
        "metrics": {
            name: {"value": metric.value, "unit": metric.unit, "gated": metric.gated}
            for name, metric in entry.metrics.items()
        },
        "verdicts": {} if judgement is None else {each.metric: str(each.verdict) for each in judgement.metrics},
    }
