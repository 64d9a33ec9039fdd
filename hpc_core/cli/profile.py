"""`hpc-core profile CASE`: show where the time of a step goes, and write a trace and a memory snapshot.

A profiled run is not a measured one: none of its numbers reaches a baseline.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import typer

from hpc_core.case.case import Case
from hpc_core.case.errors import SpecError
from hpc_core.cli.console import say, say_json, tell
from hpc_core.cli.inputs import Files, known_case
from hpc_core.gate.exit_code import ExitCode
from hpc_core.launch.launcher import Launcher
from hpc_core.record import units as sizes
from hpc_core.record.files import read_regular
from hpc_core.record.job import Job, Trace, TraceTable
from hpc_core.record.record import Record

_NAME_WIDTH = 60
_MEMORY_VIEWER = "https://pytorch.org/memory_viz"
_TRACE_VIEWER = "https://ui.perfetto.dev"


def profile(
    case: Annotated[str, typer.Argument(help="A full id, such as tiny/lora.")],
    phase: Annotated[
        str | None, typer.Option(help="Only this phase of a step: forward, backward, optimizer; prefill, decode.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The folder for the files; runs/profile/CASE by default.")] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="The device to run on.")] = "auto",
    ranges: Annotated[
        bool,
        typer.Option("--ranges", help="Only run three steps with NVTX ranges, under nsys or ncu; write nothing."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print table, files and commands as JSON.")] = False,
    cases: Files = None,
) -> None:
    """Profile one step of a case: operators by time, a trace, a memory snapshot. Exit code 11: the run broke."""
    chosen = known_case(case, cases)
    folder = (out or Path("runs", "profile", *chosen.id.split("/"))).absolute()
    trace = Trace(folder=str(folder), phase=phase, ranges=ranges)
    record = _run(chosen, device, trace)
    if record.failure is not None:
        tell(f"{chosen.id}: {record.failure.kind} in {record.failure.phase}: {record.failure.message}")
        raise typer.Exit(ExitCode.REFUSED if record.failure.kind == "refused" else ExitCode.BROKEN)
    if ranges:
        return
    table = _table(folder)
    files = {name: str(folder / name) for name in _FILES if (folder / name).exists()}
    commands = nsight_commands(chosen.id, folder, phase, cases)
    if as_json:
        say_json({"case": chosen.id, "table": table, "files": files, "commands": commands})
        return
    for line in (*_lines(chosen.id, table), *_where(files), *_commands(commands, table)):
        say(line)


_FILES = ("operators.json", "trace.json.gz", "memory.pickle")


def _run(case: Case, device: Literal["auto", "cpu", "cuda"], trace: Trace) -> Record:
    # Inline, because the profiler of NVIDIA observes this process.
    with Launcher("inline" if trace.ranges else "exec") as launcher:
        return launcher.run(Job(case=case, device=device, kind=trace))


def _table(folder: Path) -> TraceTable:
    path = folder / "operators.json"
    try:
        return msgspec.json.decode(read_regular(path), type=TraceTable)
    except (OSError, msgspec.MsgspecError) as error:
        raise SpecError(
            f"{path}: the run wrote no table there: {error}. Choose a writable folder with --out."
        ) from error


def _lines(case: str, table: TraceTable) -> list[str]:
    whose = "CUDA" if table.device == "cuda" else "CPU"
    of = "one step" if table.phase is None else f"{table.phase} of one step"
    head = f"{case}, {of}: {sizes.quantity(table.total_s, 's')} of {whose} time; the profiler adds to the host's time"
    lines = [head, f"{'operator':<{_NAME_WIDTH}}  {'calls':>7}  {'own time':>10}  {'share':>6}  {'with parts':>10}"]
    for each in table.operators:
        share = f"{100 * each.own_s / table.total_s:.1f} %" if table.total_s else "-"
        name = each.name if len(each.name) <= _NAME_WIDTH else f"{each.name[: _NAME_WIDTH - 1]}…"
        own, whole = (sizes.quantity(value, "s") for value in (each.own_s, each.whole_s))
        lines.append(f"{name:<{_NAME_WIDTH}}  {each.calls:>7,}  {own:>10}  {share:>6}  {whole:>10}")
    return lines


def _where(files: dict[str, str]) -> list[str]:
    viewers = {"trace.json.gz": f"open in {_TRACE_VIEWER}", "memory.pickle": f"drop on {_MEMORY_VIEWER}"}
    return ["", *(f"wrote {path}{f' ({viewers[name]})' if name in viewers else ''}" for name, path in files.items())]


def _commands(commands: dict[str, str], table: TraceTable) -> list[str]:
    need = "" if table.device == "cuda" else ", on a machine with a GPU"
    return ["", f"With NVIDIA's tools{need}:", *(f"  {command}" for command in commands.values())]


def nsight_commands(case: str, folder: Path, phase: str | None, files: list[Path] | None = None) -> dict[str, str]:
    """Return a command line per tool: a timeline of three steps, and the counters of the first kernels of a phase."""
    given = [part for path in files or [] for part in ("--cases", str(path))]
    watched = shlex.join(["hpc-core", "profile", case, "--ranges", *given])
    systems = [
        "nsys",
        "profile",
        "--trace=cuda,nvtx,cublas",
        "--capture-range=cudaProfilerApi",
        "--capture-range-end=stop",
    ]
    kernels = [
        "ncu",
        "--profile-from-start",
        "off",
        "--nvtx",
        *_included(phase),
        "--launch-count",
        "20",
        "--set",
        "basic",
    ]
    return {
        "nsys": f"{shlex.join([*systems, '-o', str(folder / 'nsys')])} {watched}",
        "ncu": f"{shlex.join([*kernels, '-o', str(folder / 'ncu')])} {watched}",
    }


def _included(phase: str | None) -> list[str]:
    # The slash selects a range that was pushed and popped.
    return [] if phase is None else ["--nvtx-include", f"hpc-core:{phase}/"]
