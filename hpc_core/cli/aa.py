"""`hpc-core aa`: the same work again and again on this machine, and what that says of the gate. Judges no change."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from hpc_core.cli.aa_table import table
from hpc_core.cli.console import say, tell
from hpc_core.cli.known import Files, known_cases
from hpc_core.environment import visible_gpus
from hpc_core.errors import SpecError
from hpc_core.gate.aa_samples import Declared, Samples, Start, merged, samples_from_json, samples_to_json
from hpc_core.gate.error_rates import error_rates
from hpc_core.launch.launcher import Launcher
from hpc_core.launch.protocol import Job
from hpc_core.record import Metric, Record
from hpc_core.selection import matches, unknown_glob
from hpc_core.spec import Case
from hpc_core.whole_file import write_whole

__all__ = ["aa"]

_TIMED = ("step_s", "query_s")
"""Wall time that is looked at: of a step, of a query."""


def aa(
    case: Annotated[
        list[str] | None, typer.Option("--case", help="Cases, as a glob over whole ids; repeatable.")
    ] = None,
    processes: Annotated[int, typer.Option(min=2, help="Fresh processes a case.")] = 4,
    out: Annotated[
        Path | None, typer.Option(help="Add this start's samples to a file, and judge all it holds.")
    ] = None,
    samples: Annotated[list[Path] | None, typer.Option(help="Run nothing: judge the samples of these files.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The rates as JSON, instead of a table.")] = False,
    cases: Files = None,
) -> None:
    """Run the same cases again and again: how often the gate cries wolf here, and how small a change it sees."""
    if samples:
        if case or out is not None:
            raise SpecError("--samples runs nothing: drop --case and --out.")
        held = merged([_read(path) for path in samples])
    else:
        # Read before anything runs: a file that cannot be added to must not cost a run.
        earlier = [_read(out)] if out is not None and out.exists() else []
        held = merged([*earlier, _measured(_chosen(case or [], cases), processes)])
        if out is not None:
            write_whole(out, samples_to_json(held))
            tell(f"wrote {out}: {len(held.starts)} {'start' if len(held.starts) == 1 else 'starts'}")
    rates = error_rates(held)
    say(msgspec.json.format(msgspec.json.encode(rates), indent=2).decode() if as_json else table(rates))


def _read(path: Path) -> Samples:
    try:
        return samples_from_json(path.read_bytes(), str(path))
    except OSError as error:
        raise SpecError(f"{path}: {error.strerror}. A/A samples are what hpc-core aa --out writes.") from error


def _chosen(globs: list[str], files: list[Path] | None) -> list[Case]:
    """Those asked for; by default all that run here at the scale of this machine.

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
    return [each for each in here if each.scale == ("full" if gpu else "tiny")]


def _measured(cases: list[Case], processes: int) -> Samples:
    """Round after round of all cases, so that whatever drifts is shared by them.

    Raises:
        LaunchError: no worker can be started at all.
        SpecError: a case gave no numbers.
    """
    records: dict[str, list[Record]] = {each.id: [] for each in cases}
    began = time.monotonic()
    with Launcher("warm") as launcher:
        for turn in range(processes):
            for each in cases:
                record = launcher.run(Job(case=each))
                if record.status != "ok":
                    why = record.failure.message if record.failure is not None else " ".join(record.reasons)
                    raise SpecError(f"{each.id}: process {turn + 1} of {processes} is {record.status}: {why}")
                records[each.id].append(record)
                tell(f"{each.id}: process {turn + 1} of {processes} ({time.monotonic() - began:.0f} s)")
    seen = next(iter(records.values()))[0].circumstances
    declared: dict[str, Declared] = {}
    values: dict[str, dict[str, tuple[float, ...]]] = {}
    for case_id, held in records.items():
        looked_at = {name: metric for name, metric in held[0].metrics.items() if _looked_at(name, metric)}
        declared |= {name: Declared(metric.unit, metric.noise, metric.better) for name, metric in looked_at.items()}
        values[case_id] = {name: _values(name, held) for name in looked_at}
    after = seen.gpu.get("after", {})
    start = Start(
        at=seen.started_at,
        machine=seen.machine.key,
        gpu_uuid=str(after.get("uuid", seen.machine.key)),
        stack=seen.stack,
        cases=values,
    )
    return Samples(metrics=declared, starts=(start,))


def _looked_at(name: str, metric: Metric) -> bool:
    return name in _TIMED or (metric.gated and metric.noise != "wall")


def _values(name: str, records: list[Record]) -> tuple[float, ...]:
    return tuple(record.metrics[name].value for record in records if name in record.metrics)
