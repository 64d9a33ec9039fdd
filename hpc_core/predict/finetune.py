"""Predict a fine-tuning case: memory by phase and category of its widest step, and what its steps launch and compute."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

from hpc_core.case.case import FinetuneSpec
from hpc_core.case.errors import PredictError
from hpc_core.engines.finetune import FinetuneProgram
from hpc_core.engines.tuned.program import training_program
from hpc_core.instruments.owners import (
    by_module,
    gradient_tensors,
    optimizer_tensors,
    owned_bytes,
    weight_tensors,
)
from hpc_core.predict.policy import ValuePolicy
from hpc_core.predict.session import Prediction
from hpc_core.predict.watch import Counts, GpuWatch
from hpc_core.record.record import Record
from hpc_core.worker.memory import memory_metrics
from hpc_core.worker.metrics import counted, measured_bytes, tensor_bytes

__all__ = ["between", "predict_finetune", "to_watch"]

_STEPS = 10
"""Kernels are counted over so many steps, as `perform.finetune` does under the profiler."""
_WATCHED = 3
"""Widths of ragged batches that are watched."""


def predict_finetune(prediction: Prediction, workload: FinetuneSpec) -> Record:
    """Two steps on the widest batch: the first makes the optimizer's state, the second is watched.

    Raises:
        PredictError: a switch of the tuned engine has no model here.
    """
    _refuse_unmodelled(prediction.case.id, workload)
    with prediction.fake() as (watch, policy):
        built = prediction.build(watch)
        prediction.phase("data")
        program = training_program(built, prediction.case, workload)
        trainable = sum(parameter.numel() for parameter in built.model.parameters() if parameter.requires_grad)
        prediction.metrics["trainable_parameters"] = counted(trainable, better="same")
        prediction.metrics["tokens"] = counted(program.tokens_of(workload.steps), better="same", case_only=True)
        prediction.metrics["padded_tokens"] = counted(program.padded_of(workload.steps), better="same", case_only=True)
        prediction.phase("warm-up")
        _step(program, policy, program.widest)
        prediction.metrics["optimizer_bytes"] = tensor_bytes(owned_bytes(optimizer_tensors(program.optimizer)))
        prediction.phase("memory")
        _memory(prediction, program, watch, policy)
        prediction.phase("counters")
        _counts(prediction, program, watch, policy)
        prediction.look(built)
        return prediction.record(watch)


def _refuse_unmodelled(case_id: str, workload: FinetuneSpec) -> None:
    """The chunked loss is plain torch and predicted like any; what a compiler or a CUDA graph makes of a step is not."""
    switches = {
        "graph": (workload.graph, "the private pool of a CUDA graph"),
        "compile": (workload.compile != "off", "what torch.compile keeps and launches"),
        "fusion": (workload.fusion != "off", "the fused functions' kernels"),
        "loss": (workload.loss == "liger", "what Liger's kernels take"),
        "feed": (workload.feed.way != "resident", "what a loader brings and when"),
    }
    for name, (on, what) in switches.items():
        if on:
            raise PredictError(
                f"{case_id}: {what} cannot be predicted ({name}={getattr(workload, name)!r}); measure it on a GPU, or predict it without {name}."
            )


def _step(program: FinetuneProgram, policy: ValuePolicy, index: int, watch: GpuWatch | None = None) -> None:
    batch = program.batches[index]
    # The program leaves out a mask that would be full, so one that is there is not.
    policy.know([] if batch.mask is None else [batch.mask], full=batch.mask is None)
    program.steps_done = index
    if watch is None:
        program.step()
        return

    def mark(phase: str) -> None:
        if phase == "optimizer":
            watch.own_now("gradients", gradient_tensors(program.model))
            for module, tensors in by_module(program.model, program.optimizer):
                watch.name(module, tensors)
        watch(phase)

    program.step(mark)
    watch.end_phase()


def _memory(prediction: Prediction, program: FinetuneProgram, watch: GpuWatch, policy: ValuePolicy) -> None:
    watch.begin(program.phases)
    for category, tensors in weight_tensors(program.model).items():
        watch.own_now(category, tensors)
    watch.own_now("optimizer", optimizer_tensors(program.optimizer))
    for module, tensors in by_module(program.model, program.optimizer):
        watch.name(module, tensors)
    prediction.places.learn(program.model)
    prediction.places.begin()
    _step(program, policy, program.widest, watch)
    prediction.metrics |= memory_metrics(watch.peaks, watch.timeline, on_gpu=True)
    prediction.keep(watch.timeline, program.phases, watch, "one step on the widest batch")
    _, requested = watch.timeline.peak()
    note = "tensors and scratch as asked for, without the allocator's rounding"
    prediction.metrics["peak_requested_bytes"] = measured_bytes(requested, machine=True, gated=False, note=note)


def _counts(prediction: Prediction, program: FinetuneProgram, watch: GpuWatch, policy: ValuePolicy) -> None:
    """Operators and FLOPs over a period, kernels and copies over ten steps; steps of equal shape count alike."""
    launched = [index % len(program.batches) for index in range(_STEPS)]
    by_width: dict[int, int] = {_width(program, program.widest): program.widest}
    for index in launched:
        by_width.setdefault(_width(program, index), index)
    known = {_width(program, program.widest): watch.counts()}
    for width in to_watch(sorted(by_width)):
        if width not in known:
            watch.begin(program.phases)
            _step(program, policy, by_width[width], watch)
            known[width] = watch.counts()
    if len(known) < len(by_width):
        prediction.notes.append(
            f"counts: of {len(by_width)} widths {', '.join(map(str, sorted(known)))} were watched; the others' FLOPs lie on the parabola through "
            "them, their operators and kernels are those of the nearest"
        )
    per_step = [between(known, _width(program, index)) for index in launched]
    steps = min(program.period, _STEPS)
    per = "" if steps == 1 else f" per {steps} steps"
    operators, flops = sum(each.operators for each in per_step[:steps]), sum(each.flops for each in per_step[:steps])
    prediction.metrics["operators"] = counted(operators, machine=True, unit=f"1{per}")
    prediction.metrics["flops"] = counted(flops, machine=True, unit=f"FLOP{per}")
    unit = f"1 per {_STEPS} steps"
    prediction.metrics["kernels"] = counted(sum(each.kernels for each in per_step), machine=True, unit=unit)
    prediction.metrics["copies"] = counted(sum(each.copies for each in per_step), machine=True, unit=unit)


def _width(program: FinetuneProgram, index: int) -> int:
    """Tokens a row; every batch of a program has as many rows."""
    return int(program.batches[index].ids.shape[1])


def to_watch(widths: list[int]) -> list[int]:
    """Of sorted widths the smallest, the middle one and the largest: a step at three billion parameters takes seconds to watch."""
    return widths if len(widths) <= _WATCHED else [widths[0], widths[len(widths) // 2], widths[-1]]


def between(known: dict[int, Counts], width: int) -> Counts:
    """Counts at a width from those at others.

    FLOPs of a step are c0 + c1 * width + c2 * width²: products with weights grow with the tokens, attention with their square, so three
    widths say it exactly (Lagrange's formula in fractions). Operators do not depend on the width, kernels hardly.
    """
    if width in known:
        return known[width]
    flops = sum(
        (
            Fraction(counts.flops) * math.prod(Fraction(width - other, at - other) for other in known if other != at)
            for at, counts in known.items()
        ),
        Fraction(0),
    )
    nearest = known[min(known, key=lambda at: (abs(at - width), at))]
    return replace(nearest, flops=round(flops))
