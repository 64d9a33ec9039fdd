"""Run a list of cases that takes hours; cases with a sound record are not run again. Writes only below `out`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from hpc_core.case.case import Case
from hpc_core.case.errors import SpecError
from hpc_core.cli.console import tell
from hpc_core.launch.launcher import Launcher
from hpc_core.record.environment import visible_gpus
from hpc_core.record.files import read_record, write_record
from hpc_core.record.job import Job, MeasureCeilings
from hpc_core.record.record import Record

__all__ = ["run_protocol"]


def run_protocol(cases: Sequence[Case], out: Path, *, device: Literal["auto", "cpu"]) -> list[Record]:
    """Run these cases in order and return their records; each is written to `out/records/<id>.json` at once.

    Raises:
        SpecError: the cases need a GPU and none is visible.
        LaunchError: no worker can be started at all.
        KeyboardInterrupt: after the worker is gone; finished records stay.
    """
    if any(case.needs_gpu for case in cases) and not visible_gpus():
        raise SpecError("The protocol needs a CUDA GPU and none is visible. Try it on this machine with --short.")
    records = []
    ceilings: dict[str, float] | None = None
    with Launcher("warm") as launcher:
        for number, case in enumerate(cases, start=1):
            path = out / "records" / f"{case.id}.json"
            label = f"[{number}/{len(cases)}] {case.id}"
            found = _finished(path, case)
            if found is not None:
                tell(f"{label}: measured already, not run again ({path})")
                records.append(found)
                continue
            if ceilings is None and case.needs_gpu:
                ceilings = launcher.run(Job(case=case, kind=MeasureCeilings())).circumstances.ceilings
            tell(f"{label}: running, at most {case.timeout_s / 3600:.1f} h")
            began = time.monotonic()
            record = launcher.run(Job(case=case, device=device, ceilings=ceilings or {}))
            write_record(path, record)
            tell(f"{label}: {_word(record)} after {time.monotonic() - began:.0f} s")
            records.append(record)
    return records


def _finished(path: Path, case: Case) -> Record | None:
    """Return the sound record of this very case, if the file has one; otherwise the case is measured again."""
    if not path.is_file():
        return None
    try:
        record = read_record(path)
    except SpecError:
        return None
    same = record.case.digest == case.digest and record.case.id == case.id
    return record if same and record.status == "ok" and record.circumstances.fault is None else None


def _word(record: Record) -> str:
    if record.failure is not None:
        return f"{record.failure.kind}: {record.failure.message}"
    return record.status if not record.reasons else f"invalid: {' '.join(record.reasons)}"
