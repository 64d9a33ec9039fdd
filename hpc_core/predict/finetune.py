"""Predict a fine-tuning case: memory by phase and category of its widest step, and what its steps launch and compute."""

from __future__ import annotations

from hpc_core.measure.owners import gradient_tensors, optimizer_tensors, owned_bytes, weight_tensors
from hpc_core.perform.memory import memory_metrics
from hpc_core.perform.metrics import counted, measured_bytes, tensor_bytes
from hpc_core.predict.answers import Answers
from hpc_core.predict.session import Prediction
from hpc_core.predict.watch import GpuWatch
from hpc_core.record import Record
from hpc_core.run.finetune import FinetuneProgram, finetune_program
from hpc_core.spec import FinetuneSpec

__all__ = ["predict_finetune"]

_STEPS = 10
"""Kernels are counted over so many steps, as `perform.finetune` does under the profiler."""


def predict_finetune(prediction: Prediction, workload: FinetuneSpec) -> Record:
    """Two steps on the widest batch: the first makes the optimizer's state, the second is watched."""
    with prediction.fake() as (watch, answers):
        built = prediction.build(watch)
        prediction.phase("data")
        program = finetune_program(built, prediction.case, workload)
        trainable = sum(parameter.numel() for parameter in built.model.parameters() if parameter.requires_grad)
        prediction.metrics["trainable_parameters"] = counted(trainable, better="same")
        prediction.metrics["tokens"] = counted(program.tokens_of(workload.steps), better="same", case_only=True)
        prediction.metrics["padded_tokens"] = counted(program.padded_of(workload.steps), better="same", case_only=True)
        prediction.phase("warm-up")
        _step(program, answers, program.widest)
        prediction.metrics["optimizer_bytes"] = tensor_bytes(owned_bytes(optimizer_tensors(program.optimizer)))
        prediction.phase("memory")
        _memory(prediction, program, watch, answers)
        prediction.phase("counters")
        _counts(prediction, program, watch, answers)
        prediction.look(built)
        return prediction.record(watch)


def _step(program: FinetuneProgram, answers: Answers, index: int, watch: GpuWatch | None = None) -> None:
    batch = program.batches[index]
    # The program leaves out a mask that would be full, so one that is there is not.
    answers.know([] if batch.mask is None else [batch.mask], full=batch.mask is None)
    program.steps_done = index
    if watch is None:
        program.step()
        return

    def mark(phase: str) -> None:
        if phase == "optimizer":
            watch.own_now("gradients", gradient_tensors(program.model))
        watch(phase)

    program.step(mark)
    watch.end_phase()


def _memory(prediction: Prediction, program: FinetuneProgram, watch: GpuWatch, answers: Answers) -> None:
    watch.begin(program.phases)
    for category, tensors in weight_tensors(program.model).items():
        watch.own_now(category, tensors)
    watch.own_now("optimizer", optimizer_tensors(program.optimizer))
    _step(program, answers, program.widest, watch)
    prediction.metrics |= memory_metrics(watch.peaks, watch.timeline, on_gpu=True)
    prediction.keep(watch.timeline, program.phases)
    _, requested = watch.timeline.peak()
    note = "tensors and scratch as asked for, without the allocator's rounding"
    prediction.metrics["peak_requested_bytes"] = measured_bytes(requested, machine=True, gated=False, note=note)


def _counts(prediction: Prediction, program: FinetuneProgram, watch: GpuWatch, answers: Answers) -> None:
    """Operators and FLOPs over a period, kernels and copies over ten steps; steps of equal shape count alike."""
    known = {program.batches[program.widest].ids.shape: watch.counts()}
    launched = [index % len(program.batches) for index in range(_STEPS)]
    for index in sorted(set(launched)):
        shape = program.batches[index].ids.shape
        if shape not in known:
            watch.begin(program.phases)
            _step(program, answers, index, watch)
            known[shape] = watch.counts()
    per_step = [known[program.batches[index].ids.shape] for index in launched]
    steps = min(program.period, _STEPS)
    per = "" if steps == 1 else f" per {steps} steps"
    operators, flops = sum(each.operators for each in per_step[:steps]), sum(each.flops for each in per_step[:steps])
    prediction.metrics["operators"] = counted(operators, machine=True, unit=f"1{per}")
    prediction.metrics["flops"] = counted(flops, machine=True, unit=f"FLOP{per}")
    unit = f"1 per {_STEPS} steps"
    prediction.metrics["kernels"] = counted(sum(each.kernels for each in per_step), machine=True, unit=unit)
    prediction.metrics["copies"] = counted(sum(each.copies for each in per_step), machine=True, unit=unit)
