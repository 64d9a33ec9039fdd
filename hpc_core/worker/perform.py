"""Perform a job: build, run and measure one case in this process, and give its record.

Knows nothing of processes, baselines and judging. Exceptions are the worker's to turn into records.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable

from hpc_core.case.case import CallableSpec, FinetuneSpec, GenerateSpec
from hpc_core.record.job import Event, Job, MeasureCeilings, Phase
from hpc_core.record.record import Record

__all__ = ["perform"]


def perform(job: Job, emit: Callable[[Event], None]) -> Record:
    """The record of this job's case, measured here and now.

    Raises:
        HpcCoreError: the case cannot be built or run as asked.
        Exception: whatever the code under test raises.
    """
    emit(Phase("import"))
    started = datetime.datetime.now(datetime.UTC)
    began = time.perf_counter()
    from hpc_core.worker.session import Session  # torch and the rest: seconds, inside the phase that says so

    session = Session(job, emit, started=started, began=began)
    if isinstance(job.kind, MeasureCeilings):
        return session.machine(job.kind)
    from hpc_core.faults.catalogue import in_place, inject

    if left := in_place():
        session.reasons.append(
            f"The fault {left[0]}, injected by an earlier case of this process, is still in place. Run this case in a process of its own: not inline."
        )
    if job.fault is not None:
        session.injection = inject(job.fault)
    workload = job.case.workload
    if isinstance(workload, FinetuneSpec):
        from hpc_core.worker.finetune import measure_finetune

        return measure_finetune(session, workload)
    if isinstance(workload, GenerateSpec):
        from hpc_core.worker.generate import measure_generate

        return measure_generate(session, workload)
    assert isinstance(workload, CallableSpec)
    from hpc_core.worker.callable import measure_callable

    return measure_callable(session, workload)
