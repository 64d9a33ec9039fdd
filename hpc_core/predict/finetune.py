"""Predict a fine-tuning case: memory of its widest step by phase and category, and operators, launches and FLOPs."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

from hpc_core.audit.model import context_note
from hpc_core.audit.parts import text_note
from hpc_core.case.workloads import FinetuneSpec
from hpc_core.engines.finetune import FinetuneProgram
from hpc_core.instruments.host import step_cost
from hpc_core.instruments.instrument import Instrument, observe
from hpc_core.instruments.kernels import BUSY_STEPS
from hpc_core.instruments.owners import (
    by_module,
    gradient_tensors,
    optimizer_tensors,
    owned_bytes,
    weight_tensors,
)
from hpc_core.instruments.program import Fixed
from hpc_core.predict.place import DEVICE, Place, audit, build_model, memory_of
from hpc_core.predict.watch import Counts, GpuWatch
from hpc_core.record.findings import Findings
from hpc_core.record.metrics import metric

_WATCHED = 3
"""Number of widths of ragged batches that are observed."""


def predict_finetune(place: Place) -> Findings:
    """Run two steps on the widest batch: the first creates the optimizer's state, the second is observed."""
    built, loaded = build_model(place)
    place.phases.enter("data")
    program = place.engine.load(place.case, DEVICE, built)
    assert isinstance(program, FinetuneProgram)
    counts = (
        Instrument("operators", "counters", lambda _: _counts(place, program)),
        Instrument("host's work", "host", lambda _: _host(place, program)),
    )
    return observe(
        (
            Instrument("tokens", None, lambda _: _tokens(place, program)),
            Instrument("optimizer's state", "warm-up", lambda _: _first_step(place, program)),
            Instrument("memory", "memory", lambda _: _memory(place, program)),
            *(() if place.kind.memory_only else counts),
            Instrument("audit", "audit", lambda _: audit(place, built)),
        ),
        program,
        place.phases,
        loaded | context_note(program.model, program.most_tokens) | text_note(program.model),
    )


def _tokens(place: Place, program: FinetuneProgram) -> Findings:
    workload = place.case.workload
    assert isinstance(workload, FinetuneSpec)
    trainable = sum(parameter.numel() for parameter in program.model.parameters() if parameter.requires_grad)
    values = {
        "trainable_parameters": trainable,
        "tokens": program.tokens_of(workload.steps),
        "padded_tokens": program.padded_of(workload.steps),
    }
    return Findings(metrics={name: metric(name, value) for name, value in values.items()})


def _first_step(place: Place, program: FinetuneProgram) -> Findings:
    _step(program, program.widest)
    held = owned_bytes(optimizer_tensors(program.optimizer))
    return Findings(metrics={"optimizer_bytes": metric("optimizer_bytes", held)})


def _step(program: FinetuneProgram, index: int, watch: GpuWatch | None = None) -> None:
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


def _memory(place: Place, program: FinetuneProgram) -> Findings:
    watch = place.watch
    watch.begin(program.phases)
    for category, tensors in weight_tensors(program.model).items():
        watch.own_now(category, tensors)
    watch.own_now("optimizer", optimizer_tensors(program.optimizer))
    for module, tensors in by_module(program.model, program.optimizer):
        watch.name(module, tensors)
    place.modules.learn(program.model)
    place.modules.begin()
    _step(program, program.widest, watch)
    return memory_of(place, watch.peaks, watch.timeline, program.phases, "one step on the widest batch")


def _counts(place: Place, program: FinetuneProgram) -> Findings:
    """Count operators and FLOPs over a period, and kernels and copies over ten steps. Steps of equal width have equal counts."""
    watch = place.watch
    launched = [index % len(program.batches) for index in range(BUSY_STEPS)]
    by_width: dict[int, int] = {_width(program, program.widest): program.widest}
    for index in launched:
        by_width.setdefault(_width(program, index), index)
    known = {_width(program, program.widest): watch.counts()}
    for width in to_watch(sorted(by_width)):
        if width not in known:
            watch.begin(program.phases)
            _step(program, by_width[width], watch)
            known[width] = watch.counts()
    notes: tuple[str, ...] = ()
    if len(known) < len(by_width):
        watched = ", ".join(map(str, sorted(known)))
        notes = (
            f"counts: of {len(by_width)} widths, {watched} were run; the others' FLOPs are on the parabola through "
            "them, and their operators and kernels are those of the nearest",
        )
    per_step = [between(known, _width(program, index)) for index in launched]
    steps = min(program.period, BUSY_STEPS)
    period, all_steps = None if steps == 1 else f"{steps} steps", f"{BUSY_STEPS} steps"
    totals = {
        "operators": (sum(each.operators for each in per_step[:steps]), period),
        "flops": (sum(each.flops for each in per_step[:steps]), period),
        "kernels": (sum(each.kernels for each in per_step), all_steps),
        "copies": (sum(each.copies for each in per_step), all_steps),
    }
    metrics = {name: metric(name, total, on_gpu=True, per=per) for name, (total, per) in totals.items()}
    return Findings(metrics=metrics, notes=notes)


def _host(place: Place, program: FinetuneProgram) -> Findings:
    with place.modules.pausing():
        return step_cost(Fixed(program, program.widest).step, on_gpu=True)


def _width(program: FinetuneProgram, index: int) -> int:
    """Return the tokens per row; every batch of a program has equally many rows."""
    return int(program.batches[index].ids.shape[1])


def to_watch(widths: list[int]) -> list[int]:
    """Choose the smallest, the middle and the largest of sorted widths: at three billion parameters a step takes seconds."""
    return widths if len(widths) <= _WATCHED else [widths[0], widths[len(widths) // 2], widths[-1]]


def between(known: dict[int, Counts], width: int) -> Counts:
    """Return the counts at a width from those at other widths.

    The FLOPs of a step are c0 + c1 * width + c2 * width², since products with weights grow with the tokens and attention with their
    square. So three widths determine them exactly (Lagrange's formula in fractions). Operators do not depend on the width, and
    kernels hardly do.
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
