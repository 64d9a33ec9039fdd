"""The commands: list cases, run one, look at baselines, export the original report's files. Thin: each calls one layer."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal

import typer

import hpc_core
from hpc_core.baselines.baseline import Baseline
from hpc_core.baselines.lookup import find
from hpc_core.case.case import case_to_json
from hpc_core.case.errors import SpecError
from hpc_core.cli.ab import ab
from hpc_core.cli.baselines import baseline_app
from hpc_core.cli.bisect import bisect
from hpc_core.cli.console import say, say_json, show, tell
from hpc_core.cli.doctor import doctor
from hpc_core.cli.explain import explain_record
from hpc_core.cli.faults import faults
from hpc_core.cli.history import history
from hpc_core.cli.known import Files, known_case, known_cases
from hpc_core.cli.predict import predict
from hpc_core.cli.prediction import chosen, compare, machine_key, predictions
from hpc_core.cli.prediction import markdown as beside
from hpc_core.cli.profile import profile
from hpc_core.cli.report import report
from hpc_core.cli.running import run_case
from hpc_core.gate.exit_code import ExitCode
from hpc_core.record.gpus import DEFAULT, gpu_named
from hpc_core.record.record import record_to_json
from hpc_core.report.entry import Row

__all__ = ["app"]

app = typer.Typer(
    help="Performance regressions of LLM generation and fine-tuning. The suite itself is: pytest --benchmark",
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


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Say the version.")] = False) -> None:
    if version:
        say(f"hpc-core {hpc_core.__version__}")
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
            say(case_to_json(case).decode())
        return
    width = max(len(case.id) for case in chosen)
    for case in chosen:
        say(
            f"{case.id:<{width}}  {case.scale:<5}  {case.kind:<8}  {case.digest}{'  needs a GPU' if case.needs_gpu else ''}"
        )


@app.command("run")
def run_one(
    case: Annotated[str, typer.Argument(help="A whole id, such as tiny/lora.")],
    as_json: Annotated[bool, typer.Option("--json", help="The record as JSON, instead of a table.")] = False,
    launch: Annotated[Literal["warm", "exec", "inline"], typer.Option(help="How the worker is started.")] = "exec",
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where it runs.")] = "auto",
    timeline: Annotated[bool, typer.Option("--timeline", help="Keep memory over the step in the record.")] = False,
    cases: Files = None,
) -> None:
    """Run one case and show what was measured; nothing is judged. Exit code 1: invalid, 11: the run broke."""
    record = run_case(launch, known_case(case, cases), device, timeline=timeline)
    if as_json:
        say(record_to_json(record, indent=2).decode())
    else:
        show([Row(record=record)])
    raise typer.Exit({"ok": ExitCode.OK, "invalid": ExitCode.FAILED, "failed": ExitCode.BROKEN}[record.status])


@app.command("prediction-table")
def prediction_table(
    only: Annotated[str, typer.Option(help="Cases, as a glob over whole ids.")] = "*",
    gpu: Annotated[str, typer.Option(help="The GPU whose baselines stand beside.")] = DEFAULT,
    baselines: Annotated[Path, typer.Option(help="Folder of baselines.")] = Path("baselines"),
    as_json: Annotated[bool, typer.Option("--json", help="Every number as JSON.")] = False,
) -> None:
    """Predict every case that was measured on a GPU, and print both."""
    name = gpu_named(gpu).name
    key = machine_key(name)
    cases = [case for case in chosen(only, fnmatchcase) if isinstance(find(baselines, key, case.id), Baseline)]
    if not cases:
        raise SpecError(f"{baselines / key} holds no baseline of a case that matches {only!r}.")
    misses = compare(predictions(cases, name, tell), baselines, key)
    if as_json:
        say_json(misses)
    else:
        say(beside(misses))
