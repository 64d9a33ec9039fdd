"""Predict a step of the user's own: what `perform.callable` measures of it, on fake tensors. No times."""

from __future__ import annotations

from hpc_core.case.case import CallableSpec
from hpc_core.case.errors import PredictError
from hpc_core.engines.callable import load_factory
from hpc_core.instruments.program import Program
from hpc_core.predict.own_code import own_code
from hpc_core.predict.session import Prediction
from hpc_core.predict.watch import GpuWatch
from hpc_core.record.record import Record
from hpc_core.worker.memory import memory_metrics
from hpc_core.worker.metrics import counted, measured_bytes

__all__ = ["predict_callable"]

_STEPS = 10
"""Kernels are counted over so many steps, as `perform.callable` does under the profiler."""
_PERIOD_MOST = 12
_WATCHED = 2
_SCRATCH = {
    "convolution": "cuDNN's scratch for convolutions",
    "aten.sort": "the scratch of sorting",
    "topk": "the scratch of topk",
    "_fft_": "the scratch of Fourier transforms",
    "linalg_eigh": "the scratch of linear algebra",
    "linalg_svd": "the scratch of linear algebra",
    "linalg_solve": "the scratch of linear algebra",
    "linalg_cholesky": "the scratch of linear algebra",
    "linalg_qr": "the scratch of linear algebra",
}
"""Operators, by a part of their name, that take memory beyond what they return, of which there is no model."""


def predict_callable(prediction: Prediction, workload: CallableSpec) -> Record:
    """Make the step on the fake GPU, let it settle, and watch it; each operator of its steps is seen, so none is taken to be alike.

    Raises:
        PredictError: the step leaves no trace on the GPU, or does what has no model.
    """
    with prediction.fake() as (watch, _), own_code(watch, workload.factory):
        prediction.phase("build")
        program = load_factory(workload, prediction.device.type)
        peak = watch.allocator.peak_allocated
        prediction.metrics["peak_load_bytes"] = measured_bytes(peak, machine=True, gated=False)
        prediction.phase("warm-up")
        for _ in range(min(max(2, program.period), _PERIOD_MOST)):
            program.step()
        prediction.phase("memory")
        operators, flops = _memory(prediction, program, watch)
        _refuse_nothing(prediction, workload)
        prediction.phase("counters")
        prediction.metrics["operators"] = counted(operators, machine=True)
        prediction.metrics["flops"] = counted(flops, machine=True, unit="FLOP")
        _launches(prediction, program, watch)
        return prediction.record(watch)


def _memory(prediction: Prediction, program: Program, watch: GpuWatch) -> tuple[int, int]:
    """The peaks of two steps, and what is alive in the second at its highest; its operators and FLOPs."""
    peaks: dict[str, int] = {}
    for _ in range(_WATCHED):
        watch.begin(program.phases)
        prediction.places.begin()
        program.step(watch)
        watch.end_phase()
        peaks = {name: max(peaks.get(name, 0), value) for name, value in watch.peaks.items()}
    prediction.metrics |= memory_metrics(peaks, watch.timeline, on_gpu=True)
    prediction.keep(watch.timeline, program.phases, watch)
    _, requested = watch.timeline.peak()
    note = "tensors and scratch as asked for, without the allocator's rounding"
    prediction.metrics["peak_requested_bytes"] = measured_bytes(requested, machine=True, gated=False, note=note)
    missing = sorted({said for part, said in _SCRATCH.items() if any(part in name for name in watch.operators)})
    if missing:
        prediction.notes.append(f"not in the prediction: {', '.join(missing)}")
    counts = watch.counts()
    return counts.operators, counts.flops


def _refuse_nothing(prediction: Prediction, workload: CallableSpec) -> None:
    if not prediction.metrics["peak_bytes"].value:
        raise PredictError(
            f"{workload.factory} made no tensor on the GPU, so there is nothing to predict. Give it a parameter `device` without "
            "a default, which is filled in, or let it ask torch.cuda.is_available()."
        )


def _launches(prediction: Prediction, program: Program, watch: GpuWatch) -> None:
    watch.begin(program.phases)
    for _ in range(_STEPS):
        program.step(watch)
    watch.end_phase()
    counts, unit = watch.counts(), f"1 per {_STEPS} steps"
    prediction.metrics["kernels"] = counted(counts.kernels, machine=True, unit=unit)
    prediction.metrics["copies"] = counted(counts.copies, machine=True, unit=unit)
