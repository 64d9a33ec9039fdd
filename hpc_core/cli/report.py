"""`hpc-core report RECORDS…`: show records as a table, Markdown, a page, CSV and charts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import typer

from hpc_core.baselines.reading import Reading, read_records
from hpc_core.case.errors import SpecError
from hpc_core.cli.console import say_json, show, tell
from hpc_core.instruments.garbage import uncollected
from hpc_core.record.files import write_whole
from hpc_core.record.plain import plain
from hpc_core.report.csv import records_csv
from hpc_core.report.entry import Entry, entries_of
from hpc_core.report.markdown import LOOSENED
from hpc_core.report.markdown import markdown as as_markdown
from hpc_core.report.pictures import pictures, require_charts

_SUMMARY = "GITHUB_STEP_SUMMARY"


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
    plots: Annotated[Path | None, typer.Option(help="Write charts into this folder.")] = None,
    plot_format: Annotated[Literal["svg", "png", "both"], typer.Option(help="The format of the charts.")] = "svg",
    baselines: Annotated[
        Path | None,
        typer.Option("--baselines", help="Judge by this folder of baselines; without it, nothing is judged."),
    ] = None,
    case: Annotated[list[str] | None, typer.Option(help="Only these cases: a glob over full ids; repeatable.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Verdicts and metrics as JSON, instead of the table.")
    ] = False,
) -> None:
    """Show records as a table, and write the chosen files. Exit code 0 for any verdicts, 2 if the records cannot be read."""
    if baselines is not None and not baselines.is_dir():
        raise SpecError(f"{baselines}: no such folder of baselines. Omit --baselines to judge nothing.")
    for option, path in (("--html", html), ("--markdown", markdown), ("--csv", csv)):
        if path is not None and path.is_dir():
            raise SpecError(f"{path}: this is a folder; {option} takes the file to write.")
    # All that can fail comes before the first file is written.
    with uncollected():
        found = read_records(records)
        chosen = [each for each in found.records if not case or any(fnmatchcase(each.case.id, glob) for glob in case)]
        if not chosen:
            raise SpecError(f"None of {len(found.records)} records is of a case that matches {', '.join(case or ())}.")
        entries = entries_of(chosen, baselines)
        files = _texts(entries, found, html=html, markdown=markdown, csv=csv)
        if plots is not None:
            files += pictures(entries, plots, ("svg", "png") if plot_format == "both" else (plot_format,)).items()
    for path, content in files:
        write_whole(path, content)
    if as_json:
        cases = [_entry(entry) for entry in entries]
        say_json({"cases": cases, "loosened": list(found.loosened), "notes": list(found.notes)}, order=None)
    else:
        show([entry.row for entry in entries])
    for line in _loosened_lines(found) + [f"note: {note}" for note in found.notes]:
        tell(line)
    for path, _ in files:
        tell(f"wrote {path}")


def _texts(
    entries: Sequence[Entry], read: Reading, *, html: Path | None, markdown: Path | None, csv: Path | None
) -> list[tuple[Path, bytes]]:
    """Return what to write where. In a GitHub job, the Markdown is also appended to the job's summary.

    Raises:
        MissingLibraryError: a page is asked for, and jinja2, Altair or vl-convert is not installed.
    """
    found: list[tuple[Path, str]] = []
    if html is not None:
        found.append((html, _page(entries, [*_loosened_lines(read), *read.notes])))
    summary = os.environ.get(_SUMMARY, "")
    if markdown is not None or summary:
        text = as_markdown(entries, read.notes, read.loosened)
        if markdown is not None:
            found.append((markdown, text))
        if summary:
            with Path(summary).open("a", encoding="utf-8", errors="replace") as file:
                file.write(f"{text}\n")
    if csv is not None:
        found.append((csv, records_csv(entries)))
    return [(path, text.encode(errors="replace")) for path, text in found]


def _loosened_lines(read: Reading) -> list[str]:
    return [f"{LOOSENED}: {line}" for line in read.loosened]


def _page(entries: Sequence[Entry], notes: Sequence[str]) -> str:
    require_charts()
    from hpc_core.report.page import page

    return page(entries, notes)


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
