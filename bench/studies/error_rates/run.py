"""`python -m bench.studies.error_rates`: measure the same work repeatedly on this machine, and compute the gate's error rates."""

from __future__ import annotations

import datetime
import time
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from bench.studies.error_rates.rates import error_rates
from bench.studies.error_rates.samples import (
    Declared,
    Samples,
    Start,
    merged,
    samples_from_json,
    samples_to_json,
)
from bench.studies.error_rates.table import table
from hpc_core.case.case import Case
from hpc_core.case.errors import SpecError
from hpc_core.case.select import matches, unknown_glob
from hpc_core.cli.console import say, tell
from hpc_core.cli.inputs import Files, known_cases, suite_cases
from hpc_core.launch.launcher import Launcher
from hpc_core.record.environment import visible_gpus
from hpc_core.record.files import read_record, read_regular, write_whole
from hpc_core.record.job import Job, Measure
from hpc_core.record.record import Metric, Record

__all__ = ["aa"]

_TIMED = ("step_s", "query_s")
"""The wall times that are analysed."""


def aa(
    case: Annotated[
        list[str] | None, typer.Option("--case", help="Cases, as a glob over whole ids; repeatable.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Fresh processes a case.")] = 4,
    out: Annotated[Path | None, typer.Option(help="Add the samples to a file, and judge all that it holds.")] = None,
    start: Annotated[
        str | None, typer.Option(help="Name of this machine start; a name that the file has adds processes to it.")
    ] = None,
    samples: Annotated[list[Path] | None, typer.Option(help="Run nothing: judge the samples of these files.")] = None,
    records: Annotated[
        list[Path] | None,
        typer.Option(help="Run nothing: take the records of a suite run with several processes; a folder is a start."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The rates as JSON, instead of a table.")] = False,
    cases: Files = None,
) -> None:
    """Run the same cases repeatedly; print how often the gate raises a false alarm here, and which change it detects."""
    if samples:
        if case or start is not None or out is not None or records:
            raise SpecError("--samples runs nothing: drop --case, --start, --records and --out.")
        held = merged([_read(path) for path in samples])
    else:
        # Read before anything runs: a file that cannot be added to must not cost a run.
        held = _read(out) if out is not None and out.exists() else Samples(metrics={}, starts=())
        held = _recorded(held, records, case or [], start, out) if records else held
    if not samples and not records:
        held = _measured(held, _chosen(case or [], cases), processes, start, out)
    rates = error_rates(held)
    say(msgspec.json.format(msgspec.json.encode(rates), indent=2).decode() if as_json else table(rates))


def _read(path: Path) -> Samples:
    try:
        return samples_from_json(read_regular(path), str(path))
    except OSError as error:
        raise SpecError(
            f"{path}: {error.strerror}. A/A samples are what python -m bench.studies.error_rates --out writes."
        ) from error


def _recorded(held: Samples, folders: list[Path], globs: list[str], name: str | None, out: Path | None) -> Samples:
    """Return each folder's records as one more start.

    Raises:
        SpecError: a folder without records that are looked for, a record that is not sound, one name for several folders.
    """
    if name is not None and len(folders) > 1:
        raise SpecError(
            f"--start {name} names one start, and --records names {len(folders)} folders: call it for each."
        )
    for folder in folders:
        found = [
            _sound(record, str(path))
            for path, record in _records_in(folder)
            if not globs or matches(record.case.id, globs)
        ]
        if not found:
            asked = f" of {', '.join(globs)}" if globs else ""
            raise SpecError(f"{folder} holds no record{asked}: give a folder that --perf-records wrote.")
        began = min(record.circumstances.started_at for record in found)
        held = merged([held, *(_sample(record, name or began) for record in found)])
    if out is not None:
        write_whole(out, samples_to_json(held))
        tell(f"{out} holds {len(held.starts)} start{'s' if len(held.starts) != 1 else ''}")
    return held


def _records_in(folder: Path) -> list[tuple[Path, Record]]:
    try:
        return [(path, read_record(path)) for path in sorted(folder.rglob("*/*.json"))]
    except OSError as error:
        raise SpecError(f"{folder}: {error.strerror}.") from error


def _chosen(globs: list[str], files: list[Path] | None) -> list[Case]:
    """Return the chosen cases; by default those of the suite, and the user's own, that run at this machine's scale.

    Raises:
        SpecError: a glob that matches no case that can run here.
    """
    gpu = bool(visible_gpus())
    here = [each for each in known_cases(files).values() if gpu or not each.needs_gpu]
    for glob in globs:
        if not any(matches(each.id, [glob]) for each in here):
            raise SpecError(f"--case {unknown_glob(glob, [each.id for each in here])}")
    if globs:
        return [each for each in here if matches(each.id, globs)]
    scale = "full" if gpu else "tiny"
    return [each for each in suite_cases(files).values() if each.scale == scale and (gpu or not each.needs_gpu)]


def _measured(held: Samples, cases: list[Case], processes: int, name: str | None, out: Path | None) -> Samples:
    """Run all cases round after round, so that they share any drift, and write each round when it ends.

    Raises:
        LaunchError: no worker can be started at all.
        SpecError: a case gave no numbers, or what it measures is declared otherwise in the file.
    """
    began = time.monotonic()
    name = name or datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with Launcher("warm") as launcher:
        for turn in range(1, processes + 1):
            records = []
            for each in cases:
                tell(f"{each.id}: process {turn} of {processes} ({time.monotonic() - began:.0f} s)")
                job = Job(case=each, kind=Measure(profile=False))
                records.append(_sound(launcher.run(job), f"process {turn} of {processes}"))
            held = merged([held, *(_sample(record, name) for record in records)])
            if out is not None:
                write_whole(out, samples_to_json(held))
    if out is not None:
        count = len(held.starts)
        tell(f"{out} holds {'1 start' if count == 1 else f'{count} starts'}")
    return held


def _sound(record: Record, which: str) -> Record:
    if record.status != "ok":
        why = record.failure.message if record.failure is not None else " ".join(record.reasons)
        raise SpecError(f"{record.case.id}, {which}, is {record.status}: {why}")
    return record


def _sample(record: Record, name: str) -> Samples:
    """Return the values of one process of one case."""
    seen = record.circumstances
    metrics = {key: metric for key, metric in record.metrics.items() if _analysed(key, metric)}
    start = Start(
        name=name,
        at=seen.started_at,
        machine=seen.machine.key,
        gpu_uuid=str(seen.gpu.get("after", {}).get("uuid", seen.machine.key)),
        stack=seen.stack,
        cases={record.case.id: {key: _of_processes(metric) for key, metric in metrics.items()}},
    )
    # "1 per 10 steps" in one case is "1 per prefill and 16 tokens" in another: ratios are judged, and the case is the same.
    declared = {
        key: Declared(metric.unit.partition(" per ")[0], metric.noise, metric.better) for key, metric in metrics.items()
    }
    return Samples(metrics=declared, starts=(start,))


def _of_processes(metric: Metric) -> tuple[float, ...]:
    """Return a metric's values, one per process: busy time has a sample for each process, other metrics come from one."""
    return metric.samples if metric.noise == "busy" and metric.samples is not None else (metric.value,)


def _analysed(name: str, metric: Metric) -> bool:
    return name in _TIMED or (metric.gated and metric.noise != "wall")
