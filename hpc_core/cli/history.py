"""`hpc-core history CASE [METRIC]`: show a metric over sessions and commits, where it changed, and a chart of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hpc_core.baselines.over_time import OverTime, over_time
from hpc_core.case.errors import SpecError
from hpc_core.case.select import near
from hpc_core.cli.console import say, say_json, tell
from hpc_core.record.files import read_record
from hpc_core.record.units import counted
from hpc_core.report.history import as_json, lines, overview, series
from hpc_core.report.pictures import check_picture, write_series


def history(
    case: Annotated[str, typer.Argument(help="A full id, such as tiny/lora.")],
    metric: Annotated[
        str | None, typer.Argument(help="A metric, such as peak_bytes; without it, one line per gated metric.")
    ] = None,
    baselines: Annotated[Path, typer.Option("--baselines", help="The folder of baselines.")] = Path("baselines"),
    machine: Annotated[str | None, typer.Option(help="The key of the machine, if several have the case.")] = None,
    records: Annotated[
        list[Path] | None, typer.Option(help="A folder that --perf-records wrote, for more points; repeatable.")
    ] = None,
    git: Annotated[
        bool, typer.Option(help="Include earlier versions of the baseline and its history from git.")
    ] = True,
    plot: Annotated[Path | None, typer.Option(help="Write a chart: .svg, .png or .pdf.")] = None,
    as_json_: Annotated[bool, typer.Option("--json", help="Print points and change points as JSON.")] = False,
) -> None:
    """Show a metric of a case over sessions and commits, and where it changed."""
    if plot is not None:
        check_picture(plot)
        if metric is None:
            raise SpecError(f"--plot draws one metric: hpc-core history {case} peak_bytes --plot {plot}.")
    key, found = _found(case, machine, baselines, records or [], git=git)
    chosen = [metric] if metric else sorted({name for point in found.points for name in point.metrics})
    if as_json_:
        content = as_json(case, key, [series(found.points, name) for name in chosen], found.notes)
        say_json(content, order=None)
    else:
        text = overview(found.points) if metric is None else lines(series(found.points, metric))
        first, last = found.points[0], found.points[-1]
        say(f"{case} on {key}: {counted(len(found.points), 'session')}, {first.at[:10]} to {last.at[:10]}")
        for line in text:
            say(line)
        for note in found.notes:
            tell(f"note: {note}")
    if plot is not None and metric is not None:
        write_series(case, key, series(found.points, metric), plot)
        tell(f"wrote {plot}")


def _found(case: str, machine: str | None, baselines: Path, records: list[Path], *, git: bool) -> tuple[str, OverTime]:
    """Return the machine and its points. If several machines have the case, one must be named.

    Raises:
        SpecError: no machine has the case, or several do.
    """
    known = {(path.parts[-3], f"{path.parts[-2]}/{path.stem}") for path in baselines.glob("*/*/*.json")}
    here = sorted(key for key, known_case in known if known_case == case)
    tried = [machine] if machine else here or sorted(_of_records(records, case))
    found = {key: points for key in tried if (points := over_time(baselines, key, case, records, git=git)).points}
    if len(found) == 1:
        return next(iter(found.items()))
    if found:
        raise SpecError(f"{case} is known on {', '.join(found)}: choose one with --machine.")
    close = ", ".join(near(case, {known_case for _, known_case in known})) or "none; see hpc-core baseline list"
    where = f" on {machine}" if machine else ""
    raise SpecError(f"nothing is known of {case!r}{where} in {baselines}. Near: {close}.")


def _of_records(folders: list[Path], case: str) -> set[str]:
    """Return the machines of a case's records."""
    variant = case.rpartition("/")[2]
    found = set()
    for path in (path for folder in folders for path in folder.rglob("*.json") if path.name.startswith(variant)):
        try:
            record = read_record(path)
        except SpecError:
            continue
        if record.case.id == case:
            found.add(record.circumstances.machine.key)
    return found
