"""Predict a case: build and run it on a fake GPU in this process, and return the record that it would give.

Knows nothing of processes and judging, like `hpc_core.worker.perform`. A process must load `predict.shim` before torch.
"""

from __future__ import annotations

import datetime
import gc
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from hpc_core.case.errors import PredictError
from hpc_core.engines.engine import Engine, engine_of
from hpc_core.faults.catalogue import inject
from hpc_core.instruments.clock import quiet
from hpc_core.instruments.host import as_after_compiling
from hpc_core.instruments.instrument import Phases
from hpc_core.instruments.places import following, nowhere
from hpc_core.predict.callable import predict_callable
from hpc_core.predict.fake_gpu import fake_gpu
from hpc_core.predict.finetune import predict_finetune
from hpc_core.predict.generate import predict_generate
from hpc_core.predict.place import Place
from hpc_core.predict.policy import ValuePolicy
from hpc_core.predict.watch import GpuWatch
from hpc_core.record.environment import circumstances
from hpc_core.record.findings import Findings, mismatches
from hpc_core.record.gpus import Gpu, gpu_named, with_memory
from hpc_core.record.job import Event, Job, Predict
from hpc_core.record.metrics import metric
from hpc_core.record.record import Machine, Record

MACHINE_KEY = "predicted"
"""Folder of the baselines of predictions."""

_WORKLOADS: dict[str, Callable[[Place], Findings]] = {
    "generate": predict_generate,
    "finetune": predict_finetune,
    "callable": predict_callable,
}


def predict(job: Job, emit: Callable[[Event], None], *, began: float | None = None) -> Record:
    """Return the record that this job's case would give on the GPU that its kind names: bytes, counts and FLOPs, no times.

    Args:
        job: a prediction.
        emit: called with each phase as it begins.
        began: when this process began to import what it needs, by `time.perf_counter`.

    Raises:
        PredictError: something in the case cannot be predicted. For a user's own step, the message has the line of code.
        HpcCoreError: the case cannot be built or run as asked.
    """
    assert isinstance(job.kind, Predict)
    started = datetime.datetime.now(datetime.UTC)
    phases = Phases(emit, time.perf_counter() if began is None else began)
    gpu = with_memory(gpu_named(job.kind.gpu), job.kind.memory_bytes)
    if gpu.rocm and job.case.quantization is not None:
        raise PredictError(
            f"{gpu.name}: bitsandbytes quantizes in other blocks on ROCm, which is not known here. Predict the case unquantized."
        )
    as_after_compiling()
    injection = None if job.fault is None else inject(job.fault)
    engine = engine_of(job.case)
    if (why := engine.unpredictable(job.case)) is not None:
        raise PredictError(why)
    found = _on_fake_gpu(job, job.kind, gpu, engine, phases)
    phases.enter("done")
    found |= Findings(reasons=mismatches(found.facts))
    if injection is not None:
        found |= injection.findings(job.case.id)
    build_of_torch = "a CUDA build without a GPU" if torch.version.cuda else "a CPU build"
    state: dict[str, Any] = {"predicted": gpu.name, "torch": build_of_torch}
    around = circumstances(
        "cpu",
        job.launched,
        fault=job.fault,
        started_at=started,
        where=Machine(key=MACHINE_KEY, name=gpu.name, memory_bytes=gpu.memory_bytes),
        gpu=state,
        phase_s=phases.seconds(),
        notes=(f"predicted for one {gpu.name} by {build_of_torch} of torch", *found.notes),
    )
    return found.record(job.case, around)


def _on_fake_gpu(job: Job, kind: Predict, gpu: Gpu, engine: Engine, phases: Phases) -> Findings:
    """Predict the case, and free everything while the fake GPU still exists.

    Models have reference cycles. Tensors that are freed later would be freed without the patches that they were made under, or
    under the fake GPU of the next prediction.
    """
    with fake_gpu(gpu) as (watch, policy):
        try:
            return _predicted(job, kind, engine, phases, watch, policy)
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # their local variables hold the model
            raise
        finally:
            gc.collect()


def _predicted(
    job: Job, kind: Predict, engine: Engine, phases: Phases, watch: GpuWatch, policy: ValuePolicy
) -> Findings:
    with following() as modules, quiet():  # no garbage collection, as in a timed step
        watch.place = modules.here
        try:
            found = _WORKLOADS[job.case.kind](Place(job.case, engine, kind, phases, watch, policy, modules))
        finally:
            watch.place = nowhere  # the watch outlives the modules and must not keep them alive
    note = "from the model of the allocator; depends on the order in which weights were loaded: low confidence"
    return found | Findings(
        metrics={"reserved_bytes": metric("reserved_bytes", watch.allocator.peak_reserved, note=note)}
    )
