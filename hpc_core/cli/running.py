"""Running single cases from the command line: one launcher, one line a phase, records as files. Judges nothing."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

from hpc_core.case.case import Case
from hpc_core.case.errors import SpecError
from hpc_core.cli.console import tell
from hpc_core.launch.launcher import Launcher
from hpc_core.record.files import write_whole
from hpc_core.record.job import Event, Job, Measure, MeasureCeilings, Phase
from hpc_core.record.record import Record, record_from_json, record_to_json

__all__ = ["read_record", "run_case", "write_record"]

_SHOWN_PHASES = ("build", "warm-up", "measure", "memory", "counters", "busy")


def run_case(
    launcher_way: Literal["warm", "exec", "inline"],
    case: Case,
    device: Literal["auto", "cpu", "cuda"],
    *,
    timeline: bool = False,
) -> Record:
    """Run one case alone, telling its phases.

    Raises:
        LaunchError: no worker can be started at all.
    """
    began = time.monotonic()

    def heard(_: Case, event: Event) -> None:
        if isinstance(event, Phase) and event.name in _SHOWN_PHASES:
            tell(f"{case.id}: {event.name} ({time.monotonic() - began:.0f} s)")

    with Launcher(launcher_way, on_event=heard) as launcher:
        ceilings = {}
        if device == "cuda" or (device == "auto" and case.needs_gpu):
            ceilings = launcher.run(Job(case=case, device=device, kind=MeasureCeilings())).circumstances.ceilings
        return launcher.run(Job(case=case, device=device, ceilings=ceilings, kind=Measure(timeline=timeline)))


def read_record(path: Path) -> Record:
    """The record of a file.

    Raises:
        SpecError: there is none, or it is no record; the message names the file.
    """
    try:
        return record_from_json(path.read_bytes())
    except OSError as error:
        raise SpecError(
            f"{path}: {error.strerror}. A record is a file that --perf-records or 'run --json' wrote."
        ) from error
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from error


def write_record(path: Path, record: Record) -> None:
    """Write a record whole or not at all."""
    write_whole(path, record_to_json(record, indent=2) + b"\n")
