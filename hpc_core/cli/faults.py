"""`hpc-core faults`: inject faults, and report what the gate catches or what the explanation names."""

from __future__ import annotations

import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import typer

from hpc_core.case.errors import SpecError
from hpc_core.cli.console import say, say_json, tell
from hpc_core.cli.fault_causes import EXPLAINED, cause_table, explained_faults
from hpc_core.cli.fault_trials import Trial, markdown, run_trials, summary, trial_cases
from hpc_core.faults.catalogue import FAULTS
from hpc_core.gate.exit_code import ExitCode
from hpc_core.launch.launcher import Launcher
from hpc_core.record.environment import visible_gpus
from hpc_core.record.gpus import DEFAULT


def faults(
    only: Annotated[
        list[str] | None, typer.Option(help="Names or globs, separated by commas; may be repeated.")
    ] = None,
    scale: Annotated[
        Literal["tiny", "full"], typer.Option(help="tiny: on a CPU. full: four layers of full width on a GPU.")
    ] = "tiny",
    against: Annotated[
        Literal["baselines", "clean"] | None,
        typer.Option(help="Judge against accepted baselines (default) or a clean run of each case (default for full)."),
    ] = None,
    baselines: Annotated[Path, typer.Option(help="Folder of baselines.")] = Path("baselines"),
    jobs: Annotated[
        int, typer.Option("--jobs", min=1, help="Parallel workers. With more than one, no time is judged.")
    ] = 1,
    predicted: Annotated[
        bool,
        typer.Option(
            "--predicted",
            help="Predict four layers of full width for an H100, clean and with each fault, instead of running.",
        ),
    ] = False,
    memory: Annotated[
        bool,
        typer.Option(
            "--memory",
            help="With --predicted: all layers, only faults that must show in bytes, no twins.",
        ),
    ] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print every trial, or every cause, as JSON.")] = False,
    explained: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Inject six faults (or those of --only) and print the explanation of each as Markdown.",
        ),
    ] = False,
    out: Annotated[Path | None, typer.Option(help="With --explain: a folder for the records and the table.")] = None,
) -> None:
    """Inject every fault and its no-op twin. Exit code 1 if the gate misses a fault or alarms on a twin."""
    if predicted and against == "baselines":
        raise SpecError(
            "Predicted faults are judged against a clean prediction: drop --against, or use --against clean."
        )
    if memory and not predicted:
        raise SpecError("--memory needs --predicted.")
    if out is not None and not explained:
        raise SpecError("--out needs --explain.")
    scale = "full" if predicted else scale
    chosen = ",".join(only or ["*"])
    if explained:
        _explain_faults(chosen, scale, predicted=predicted, as_json=as_json, out=out)
        return
    names = _faults_here(chosen, "memory" if memory else "predicted" if predicted else scale)
    if scale == "full" and not predicted:
        if against == "baselines":
            raise SpecError("The short full-size cases have no baselines: drop --against, or use --against clean.")
        if not visible_gpus():
            raise SpecError("--scale full needs a CUDA GPU, and none is visible. Omit it to try the faults on a CPU.")
    if jobs > 1 and not predicted:
        tell(f"{jobs} workers share the machine, so no time is judged.")
    began = time.monotonic()
    trials = run_trials(
        names,
        cases=trial_cases("whole" if memory else scale),
        memory=memory,
        against=against or ("clean" if scale == "full" else "baselines"),
        baselines=baselines,
        jobs=jobs,
        predict=DEFAULT if predicted else None,
        tell=tell,
    )
    _show(trials, time.monotonic() - began, as_markdown=as_markdown, as_json=as_json)
    if not all(trial.good for trial in trials):
        raise typer.Exit(ExitCode.FAILED)


def _show(trials: list[Trial], seconds: float, *, as_markdown: bool, as_json: bool) -> None:
    if as_json:
        say_json(
            [{**msgspec.structs.asdict(trial), "fault": trial.fault.name, "outcome": trial.outcome} for trial in trials]
        )
    else:
        if as_markdown:
            say(markdown(trials))
        say(summary(trials, seconds))


def _explain_faults(
    only: str, scale: Literal["tiny", "full"], *, predicted: bool, as_json: bool, out: Path | None
) -> None:
    if scale == "full" and not predicted and not visible_gpus():
        raise SpecError("--scale full needs a CUDA GPU, and none is visible. Omit it to try the faults on a CPU.")
    names = list(EXPLAINED) if only == "*" else _faults_here(only, "predicted" if predicted else scale)
    if out is not None and out.exists() and not out.is_dir():
        raise SpecError(f"{out} is a file; --out names a folder.")
    scale = "full" if predicted else scale
    with Launcher("warm", predicting=predicted) as launcher:
        found = explained_faults(
            names, launcher, cases=trial_cases(scale), tell=tell, predict=DEFAULT if predicted else None, out=out
        )
    if as_json:
        say_json([{**msgspec.to_builtins(each), "named": each.good, "missing": each.missing} for each in found])
    else:
        say(cause_table(found))
    if not all(each.good for each in found):
        raise typer.Exit(ExitCode.FAILED)


def _faults_here(only: str, path: Literal["tiny", "full", "predicted", "memory"]) -> list[str]:
    """Return the chosen faults that must be caught here, and report the others."""
    globs = [glob.strip() for glob in only.split(",")]
    if strange := [glob for glob in globs if not any(fnmatchcase(name, glob) for name in FAULTS)]:
        raise SpecError(f"No fault is called {strange[0]!r}. There are: {', '.join(FAULTS)}.")
    asked = [name for name in FAULTS if any(fnmatchcase(name, glob) for glob in globs)]
    if path == "predicted":
        names = [name for name in asked if FAULTS[name].predicted]
    elif path == "memory":
        names = [name for name in asked if any(metric.endswith("_bytes") for metric in FAULTS[name].predicted)]
    else:
        here = {"tiny": "cpu", "full": "gpu"}[path]
        names = [name for name in asked if FAULTS[name].seen_on in (here, "both")]
    if elsewhere := [name for name in asked if name not in names]:
        tell(f"Not tried, because they do not show here: {', '.join(elsewhere)}.")
    return names
