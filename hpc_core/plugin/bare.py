"""A bare callable as a case: measured in this very process, where no fresh one can be had. The only way to torch here.

Exact metrics are gated; busy time is only reported, because whatever else this process does is in it.
"""

from __future__ import annotations

import importlib
import time
import warnings
from collections.abc import Callable
from typing import Any

import msgspec

from hpc_core.case.case import Case
from hpc_core.record.environment import visible_gpus
from hpc_core.record.job import Event, Job
from hpc_core.record.record import Metric, Record

__all__ = ["load_measuring_half", "measure_here"]

NOTE = "measured in the test process: time is reported, not gated"


def load_measuring_half() -> None:
    """Import torch and what measures with it. What their imports warn of is not the user's affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("hpc_core.worker.perform")


def measure_here(case: Case, step: Callable[[], Any], emit: Callable[[Event], None]) -> Record:
    """The record of calling `step`. What the step raises leaves this function, for the traceback and for `--pdb`.

    Raises:
        ModuleNotFoundError: torch is not installed.
        Exception: whatever the step raises.
    """
    began = time.perf_counter()
    load_measuring_half()
    # Named, not imported: the plugin must load, and collect, without torch.
    perform = importlib.import_module("hpc_core.worker.perform").perform
    job = Job(case=case, launched="inline", device="cuda" if visible_gpus() else "cpu")
    record: Record = perform(job, emit, began=began, step=step)
    seen = record.circumstances
    return msgspec.structs.replace(
        record,
        metrics={name: _ungated_time(metric) for name, metric in record.metrics.items()},
        circumstances=msgspec.structs.replace(seen, notes=(NOTE, *seen.notes)),
    )


def _ungated_time(metric: Metric) -> Metric:
    return msgspec.structs.replace(metric, gated=False) if metric.noise == "busy" else metric
