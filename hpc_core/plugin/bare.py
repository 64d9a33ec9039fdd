"""A bare callable as a case: measured in this very process, where no fresh one can be had. The only way to torch here.

Exact metrics are gated; busy time is only reported, because whatever else this process does is in it.
"""

from __future__ import annotations

import datetime
import importlib
import time
import warnings
from collections.abc import Callable
from typing import Any

import msgspec

from hpc_core.case.case import CallableSpec, Case
from hpc_core.record.environment import visible_gpus
from hpc_core.record.job import Event, Job
from hpc_core.record.record import Metric, Record

__all__ = ["load_measuring_half", "measure_here"]

NOTE = "measured in the test process: time is reported, not gated"


def load_measuring_half() -> None:
    """Import torch and what measures with it. What their imports warn of is not the user's affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("session", "callable", "generate", "finetune"):
            importlib.import_module(f"hpc_core.worker.{name}")


def measure_here(case: Case, step: Callable[[], Any], emit: Callable[[Event], None]) -> Record:
    """The record of calling `step`. What the step raises leaves this function, for the traceback and for `--pdb`.

    Raises:
        ModuleNotFoundError: torch is not installed.
        Exception: whatever the step raises.
    """
    started, began = datetime.datetime.now(datetime.UTC), time.perf_counter()
    load_measuring_half()
    # Named, not imported: the plugin must load, and collect, without torch.
    session_type = importlib.import_module("hpc_core.worker.session").Session
    measure_program = importlib.import_module("hpc_core.worker.callable").measure_program
    program = importlib.import_module("hpc_core.engines.callable").CallableProgram(step)
    assert isinstance(case.workload, CallableSpec)
    job = Job(case=case, launched="inline", device="cuda" if visible_gpus() else "cpu")
    session = session_type(job, emit, started=started, began=began)
    session.notes.append(NOTE)
    record: Record = measure_program(session, program, case.workload.steps)
    return msgspec.structs.replace(
        record, metrics={name: _ungated_time(metric) for name, metric in record.metrics.items()}
    )


def _ungated_time(metric: Metric) -> Metric:
    return msgspec.structs.replace(metric, gated=False) if metric.noise == "busy" else metric
