"""The application `hpc-core`: its list of commands, and the two short ones, `cases` and `run`."""

from __future__ import annotations

import time
from typing import Annotated, Literal

import typer

from hpc_core.case.case import Case, case_to_json
from hpc_core.cli.ab import ab
from hpc_core.cli.baselines import baseline_app
from hpc_core.cli.bisect import bisect
from hpc_core.cli.console import say, say_encoded, show, tell
from hpc_core.cli.doctor import doctor
from hpc_core.cli.explain import explain_record
from hpc_core.cli.faults import faults
from hpc_core.cli.history import history
from hpc_core.cli.inputs import Files, known_case, known_cases
from hpc_core.cli.predict import predict
from hpc_core.cli.prediction_table import prediction_table
from hpc_core.cli.profile import profile
from hpc_core.cli.report import report
from hpc_core.gate.exit_code import ExitCode
from hpc_core.launch.launcher import Launcher
from hpc_core.record.job import Event, Job, Measure, MeasureCeilings, Phase
from hpc_core.record.record import Record, record_to_json
from hpc_core.record.version import __version__
from hpc_core.report.entry import Row

app = typer.Typer(
    help="Performance regressions of LLM generation and fine-tuning. The suite itself runs with: pytest --benchmark",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(baseline_app, name="baseline")
app.command("predict")(predict)
app.command("history")(history)
app.command("report")(report)
app.command("explain")(explain_record)
app.command("doctor")(doctor)
app.command("faults")(faults)
app.command("profile")(profile)
app.command("ab")(ab)
app.command("bisect")(bisect)
app.command("prediction-table")(prediction_table)

_SHOWN_PHASES = ("build", "warm-up", "measure", "memory", "counters", "busy")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        say(f"hpc-core {__version__}")
        raise typer.Exit


@app.command("cases")
def list_cases(
    scale: Annotated[Literal["tiny", "small", "full"] | None, typer.Option(help="Only this scale.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One case a line, as JSON.")] = False,
    cases: Files = None,
) -> None:
    """List the cases: id, scale, kind, digest."""
    chosen = [case for case in known_cases(cases).values() if scale in (None, case.scale)]
    if as_json:
        for case in chosen:
            say_encoded(case_to_json(case))
        return
    width = max(len(case.id) for case in chosen)
    for case in chosen:
        say(
            f"{case.id:<{width}}  {case.scale:<5}  {case.kind:<8}  {case.digest}{'  needs a GPU' if case.needs_gpu else ''}"
        )


@app.command("run")
def run_one(
    case: Annotated[str, typer.Argument(help="A full id, such as tiny/lora.")],
    as_json: Annotated[bool, typer.Option("--json", help="The record as JSON, instead of a table.")] = False,
    launch: Annotated[Literal["warm", "exec", "inline"], typer.Option(help="How to start the worker.")] = "exec",
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="The device to run on.")] = "auto",
    timeline: Annotated[bool, typer.Option("--timeline", help="Store memory over the step in the record.")] = False,
    cases: Files = None,
) -> None:
    """Run one case and show what was measured; nothing is judged. Exit code 1: invalid, 11: the run broke."""
    record = _run_case(launch, known_case(case, cases), device, timeline=timeline)
    if as_json:
        say_encoded(record_to_json(record, indent=2))
    else:
        show([Row(record=record)])
    raise typer.Exit({"ok": ExitCode.OK, "invalid": ExitCode.FAILED, "failed": ExitCode.BROKEN}[record.status])


def _run_case(
    launcher_way: Literal["warm", "exec", "inline"],
    case: Case,
    device: Literal["auto", "cpu", "cuda"],
    *,
    timeline: bool,
) -> Record:
    """Run one case alone, and report its phases on stderr.

    Raises:
        LaunchError: no worker can be started at all.
    """
    began = time.monotonic()

    def on_event(_: Case, event: Event) -> None:
        if isinstance(event, Phase) and event.name in _SHOWN_PHASES:
            tell(f"{case.id}: {event.name} ({time.monotonic() - began:.0f} s)")

    with Launcher(launcher_way, on_event=on_event) as launcher:
        ceilings = {}
        if device == "cuda" or (device == "auto" and case.needs_gpu):
            ceilings = launcher.run(Job(case=case, device=device, kind=MeasureCeilings())).circumstances.ceilings
        return launcher.run(Job(case=case, device=device, ceilings=ceilings, kind=Measure(timeline=timeline)))
