"""Predicts a list of jobs in one fresh process, which loads the empty device before torch: `python -m tests.predict.predicting`.

Reads jobs as JSON from standard input and writes their records to standard output in the same order.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from hpc_core.case.case import Case
from hpc_core.record.job import Job, Predict
from hpc_core.record.record import Record

__all__ = ["GPU", "predicted", "predicted_jobs", "refusal", "values"]

ROOT = Path(__file__).parents[2]
GPU = "H100 80GB HBM3"


def predicted(cases: Sequence[Case], gpu: str = GPU, *, first: str = "", timeout_s: float = 300.0) -> list[Record]:
    """The predictions of these cases, made one after another by one process.

    `first` names a function of `tests.predict.odd_models` to call before.
    """
    return predicted_jobs([Job(case=case, kind=Predict(gpu=gpu)) for case in cases], first=first, timeout_s=timeout_s)


def predicted_jobs(jobs: Sequence[Job], *, first: str = "", timeout_s: float = 300.0) -> list[Record]:
    """The predictions of these jobs, as `predicted` makes them. A fault that a job injects stays for the jobs after it."""
    command = [sys.executable, "-m", "tests.predict.predicting", *([first] if first else [])]
    encoded = msgspec.json.encode(jobs)
    done = subprocess.run(command, input=encoded, capture_output=True, timeout=timeout_s, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr.decode()
    return msgspec.json.decode(done.stdout, type=list[Record])


def values(record: Record) -> dict[str, float | int]:
    """The metrics' values of a record that must not have failed."""
    assert record.failure is None, f"{record.case.id}: {record.failure.message}\n{record.failure.detail}"
    return {name: metric.value for name, metric in record.metrics.items()}


def refusal(record: Record) -> str:
    """The message, on one line, of a record that must have been refused."""
    assert record.failure is not None
    assert record.failure.kind == "refused", record.failure.detail
    assert "\n" not in record.failure.message
    return record.failure.message


def _serve(first: str) -> None:
    from hpc_core.predict import shim

    shim.load()
    from hpc_core.worker.main import run_job

    if first:
        from tests.predict import odd_models

        getattr(odd_models, first)()
    jobs = msgspec.json.decode(sys.stdin.buffer.read(), type=list[Job])
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)  # what libraries print goes to standard error
        out.write(msgspec.json.encode([run_job(job, lambda _: None) for job in jobs]))


if __name__ == "__main__":
    _serve("".join(sys.argv[1:]))
