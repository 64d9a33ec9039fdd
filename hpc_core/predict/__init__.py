"""Predict a case without a GPU: the same build and run code on fake tensors, with a model of the GPU's allocator below it.

Knows nothing of processes and judging, like `hpc_core.worker.perform`, whose record it imitates. A process must load
`predict.shim` before torch.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable

from hpc_core.case.case import FinetuneSpec, GenerateSpec
from hpc_core.record.job import Event, Job, Phase
from hpc_core.record.record import Record

__all__ = ["perform"]


def perform(job: Job, emit: Callable[[Event], None]) -> Record:
    """The record that this job's case would give on the GPU named in `job.kind`: bytes, counts and FLOPs, no times.

    Raises:
        PredictError: something in the case has no model here; of a step of the user's own, with the place in its code.
        HpcCoreError: the case cannot be built or run as asked.
    """
    emit(Phase("import"))
    started = datetime.datetime.now(datetime.UTC)
    from hpc_core.predict.session import Prediction  # torch and the rest: seconds, inside the phase that says so

    prediction = Prediction(job, emit, started=started)
    workload = job.case.workload
    if isinstance(workload, FinetuneSpec):
        from hpc_core.predict.finetune import predict_finetune

        return predict_finetune(prediction, workload)
    if isinstance(workload, GenerateSpec):
        from hpc_core.predict.generate import predict_generate

        return predict_generate(prediction, workload)
    from hpc_core.predict.callable import predict_callable

    return predict_callable(prediction, workload)
