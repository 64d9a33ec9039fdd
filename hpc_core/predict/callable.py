"""Predict a user's own step on fake tensors: memory, operators and launches, but no times."""

from __future__ import annotations

from hpc_core.case.errors import PredictError
from hpc_core.case.workloads import CallableSpec
from hpc_core.engines.engine import Program
from hpc_core.instruments.host import step_cost
from hpc_core.instruments.instrument import Instrument, observe
from hpc_core.instruments.kernels import BUSY_STEPS
from hpc_core.predict.own_code import own_code
from hpc_core.predict.place import DEVICE, Place, load_peak, memory_of
from hpc_core.record.findings import Findings
from hpc_core.record.metrics import metric

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
"""Operators, by a part of their name, whose scratch memory is not modelled."""


def predict_callable(place: Place) -> Findings:
    """Build the step on the fake GPU, warm it up, and observe every operator of its steps.

    Raises:
        PredictError: the step does not use the GPU, or does something that cannot be predicted.
    """
    workload = place.case.workload
    assert isinstance(workload, CallableSpec)
    with own_code(place.watch, workload.factory):
        place.phases.enter("build")
        program = place.engine.load(place.case, DEVICE, None)
        counts = (
            Instrument("launches", "counters", lambda _: _launches(place, program)),
            Instrument("host's work", "host", lambda _: _host(place, program)),
        )
        return observe(
            (
                Instrument("warm-up", "warm-up", lambda _: _warm_up(program)),
                Instrument("memory", "memory", lambda _: _memory(place, program, workload.factory)),
                *(() if place.kind.memory_only else counts),
            ),
            program,
            place.phases,
            load_peak(place),
        )


def _warm_up(program: Program) -> Findings:
    for _ in range(min(max(2, program.period), _PERIOD_MOST)):
        program.step()
    return Findings()


def _memory(place: Place, program: Program, factory: str) -> Findings:
    """Return the peaks of two steps, the second one's memory at its peak, and its operators and FLOPs."""
    watch = place.watch
    peaks: dict[str, int] = {}
    for _ in range(_WATCHED):
        watch.begin(program.phases)
        place.modules.begin()
        program.step(watch)
        watch.end_phase()
        peaks = {name: max(peaks.get(name, 0), value) for name, value in watch.peaks.items()}
    found = memory_of(place, peaks, watch.timeline, program.phases)
    if not found.metrics["peak_bytes"].value:
        raise PredictError(
            f"{factory} made no tensor on the GPU, so there is nothing to predict. Give it a parameter `device` without "
            "a default, which is filled in, or let it ask torch.cuda.is_available()."
        )
    missing = sorted({what for part, what in _SCRATCH.items() if any(part in name for name in watch.operators)})
    notes = (f"not in the prediction: {', '.join(missing)}",) if missing else ()
    if place.kind.memory_only:
        return found | Findings(notes=notes)
    counts = watch.counts()
    metrics = {
        "operators": metric("operators", counts.operators, on_gpu=True),
        "flops": metric("flops", counts.flops, on_gpu=True),
    }
    return found | Findings(metrics=metrics, notes=notes)


def _host(place: Place, program: Program) -> Findings:
    with place.modules.pausing():
        return step_cost(program.step, on_gpu=True)


def _launches(place: Place, program: Program) -> Findings:
    place.watch.begin(program.phases)
    for _ in range(BUSY_STEPS):
        program.step(place.watch)
    place.watch.end_phase()
    counts, per = place.watch.counts(), f"{BUSY_STEPS} steps"
    return Findings(
        metrics={
            "kernels": metric("kernels", counts.kernels, on_gpu=True, per=per),
            "copies": metric("copies", counts.copies, on_gpu=True, per=per),
        }
    )
