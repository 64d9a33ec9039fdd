"""Measure a fine-tuning case: step time, memory by phase and category, operators, FLOPs, GPU-busy time, losses, audit."""

from __future__ import annotations

import contextlib
import math
import statistics

from hpc_core.audit import Ran, StepSeen, attention_facts, audited_step, loss_facts, trainable_facts, training_facts
from hpc_core.bounds.cost import train_flops
from hpc_core.builders import Built
from hpc_core.case.case import FinetuneSpec
from hpc_core.engines.finetune import FinetuneProgram
from hpc_core.engines.tuned.program import training_program
from hpc_core.instruments.clock import seconds_of
from hpc_core.instruments.counters import counting
from hpc_core.instruments.owners import (
    by_module,
    gradient_tensors,
    optimizer_tensors,
    owned_bytes,
)
from hpc_core.instruments.program import Mark
from hpc_core.record.job import Repeat, Retime, Trace
from hpc_core.record.record import Fact, Record
from hpc_core.worker.attributed import Owning, note_profile
from hpc_core.worker.callable import measure_again
from hpc_core.worker.energy import note_step_energy
from hpc_core.worker.equivalence import (
    MOST_ROWS,
    MOST_TOKENS,
    Given,
    measure_equivalence,
)
from hpc_core.worker.feed import measure_feed
from hpc_core.worker.kept import weights_kept
from hpc_core.worker.memory import (
    Fixed,
    Watch,
    measure_memory,
    note_unexplained,
)
from hpc_core.worker.metrics import (
    counted,
    ratio,
    reported,
    tensor_bytes,
    wall,
)
from hpc_core.worker.observe import LayerForwards, checkpointing_seen, count_layer_forwards
from hpc_core.worker.profiled import BUSY_STEPS, note_compilations, profile_steps
from hpc_core.worker.session import Session
from hpc_core.worker.soak import Soak
from hpc_core.worker.trace import trace_program
from hpc_core.worker.tuned import (
    audit_switches,
    audit_tuned,
    measure_graph_memory,
    recomputed_attentions,
)

__all__ = ["measure_finetune"]


def measure_finetune(session: Session, workload: FinetuneSpec) -> Record:
    """Build, warm up, time, and take each instrument in turn, the profiler last."""
    built = session.build()
    session.phase("data")
    program = training_program(built, session.case, workload)
    try:
        return _measured(session, built, program, workload)
    finally:
        program.batches.clear()  # a loader's workers end with it


def _measured(session: Session, built: Built, program: FinetuneProgram, workload: FinetuneSpec) -> Record:
    trainable = sum(parameter.numel() for parameter in built.model.parameters() if parameter.requires_grad)
    session.metrics["trainable_parameters"] = counted(trainable, better="same")
    session.warm_up(program, lambda: _note_loss(session, program), first_steps=program.first_steps)
    if isinstance(session.kind, Trace):
        with program.batches.by_index():  # the same batch again: a loader would bring all others in between
            return trace_program(session, Fixed(program, program.widest), session.kind)
    if isinstance(session.kind, Repeat | Retime):
        audit_switches(session, program)  # an engine that fell back here would be timed as if it had not
    if isinstance(session.kind, Repeat):
        program.go_to(0)  # the batches that the first process measured
        return measure_again(session, program, workload.steps)
    _time_steps(session, program, workload)
    if isinstance(session.kind, Retime):
        _busy(session, program)
        measure_feed(session, built, program, workload)
        return session.record()
    session.metrics["optimizer_bytes"] = tensor_bytes(owned_bytes(optimizer_tensors(program.optimizer)))
    widest = Fixed(program, program.widest)
    with program.uncaptured():
        measure_memory(
            session,
            widest,
            built.model,
            program.optimizer,
            marking=lambda watch: _gradient_marks(session, program, watch),
        )
        note_unexplained(session)
        ran, seen = _count(session, program)
        _audit(session, program, workload, ran, seen)
    measure_graph_memory(session, program)
    audit_tuned(session, program)
    _busy(session, program)
    measure_feed(session, built, program, workload)
    _energy(session, program)
    with program.uncaptured():
        note_profile(
            session,
            widest,
            "one step on the widest batch",
            model=built.model,
            optimizer=program.optimizer,
            marking=lambda watch: named_gradients(program, watch),
        )
    _learning(session, program, workload)
    measure_equivalence(session, built.model, _left_for_reference(program))
    return session.record()


def _left_for_reference(program: FinetuneProgram) -> Given:
    """The longest rows of the widest batch; optimizer state, gradients and all other batches go, to make room."""
    batch = program.batches[program.widest]
    program.release()
    rows = list(range(len(batch.ids)))
    if batch.mask is not None:
        rows = batch.mask.sum(dim=1).argsort(descending=True, stable=True).tolist()
    ids, labels, mask = (
        None if part is None else part[rows[:MOST_ROWS], :MOST_TOKENS] for part in (batch.ids, batch.labels, batch.mask)
    )
    assert ids is not None
    return Given(ids, mask, labels=labels)


def _note_loss(session: Session, program: FinetuneProgram) -> None:
    assert program.loss is not None
    session.losses.append(float(program.loss))


def _time_steps(session: Session, program: FinetuneProgram, workload: FinetuneSpec) -> None:
    program.go_to(0)  # every pass sees the same batches
    samples = []
    soak = Soak(session, workload.steps) if workload.soaks else None
    with session.timing():
        for done in range(1, workload.steps + 1):
            samples.append(seconds_of(program.step, session.device))
            _note_loss(session, program)
            if soak is not None:
                soak.after_step(done)
    if soak is not None:
        soak.close(workload.steps)
    tokens, padded = program.tokens_of(workload.steps), program.padded_of(workload.steps)
    session.metrics["step_s"] = wall(samples)
    session.metrics["tokens"] = counted(tokens, better="same", case_only=True)
    session.metrics["padded_tokens"] = counted(padded, better="same", case_only=True)
    session.metrics["tokens_per_s"] = reported(
        tokens / sum(samples), "tokens/s", better="higher", note="unpadded tokens"
    )
    batches = workload.epoch_rows // workload.batch if workload.epoch_rows else program.epoch.batches
    # Ragged batches cost differently, so an epoch is so many times the mean; equal ones so many times the median.
    typical = statistics.median(samples) if program.period == 1 else statistics.fmean(samples)
    note = f"extrapolated: {batches} steps like the {workload.steps} measured"
    session.metrics["epoch_s"] = reported(typical * batches, "s", note=note)


def _gradient_marks(session: Session, program: FinetuneProgram, watch: Watch) -> Mark:
    def mark(phase: str) -> None:
        if phase == "optimizer":  # after backward, before the step: every gradient is there
            gradients = gradient_tensors(program.model)
            watch.own_now("gradients", gradients)
            session.metrics["gradient_bytes"] = tensor_bytes(owned_bytes(gradients))
        watch(phase)

    return mark


def named_gradients(program: FinetuneProgram, watch: Owning) -> Mark:
    """The watch as a mark that also says whose the gradients are, before the optimizer's step."""

    def mark(phase: str) -> None:
        if phase == "optimizer":
            watch.own("gradients", gradient_tensors(program.model))
            for module, tensors in by_module(program.model, program.optimizer):
                watch.name(module, tensors)
        watch(phase)

    return mark


def _count(session: Session, program: FinetuneProgram) -> tuple[Ran, StepSeen | None]:
    """Count a pass; the audit looks at the step on the widest batch in it, which saves a step of its own."""
    session.phase("counters")
    steps = min(program.period, BUSY_STEPS)
    seen = None
    watched = count_layer_forwards(program.model) if session.options.audit else contextlib.nullcontext(LayerForwards())
    with counting() as counts, watched as forwards:
        for index in range(steps):
            program.steps_done = index
            if session.options.audit and index == program.widest:
                seen = audited_step(program, session.aside)
            else:
                program.step()
    per = "" if steps == 1 else f" per {steps} steps"
    session.metrics["operators"] = counted(counts.total, machine=session.on_gpu, unit=f"1{per}")
    session.metrics["flops"] = counted(counts.flops, unit=f"FLOP{per}", machine=session.on_gpu)
    again = recomputed_attentions(program)
    planned = None if again is None else checkpointing_seen((forwards.layers + again) * steps, forwards.layers, steps)
    return Ran(counts.operators, checkpointing_seen(forwards.count, forwards.layers, steps), planned), seen


def _audit(session: Session, program: FinetuneProgram, workload: FinetuneSpec, ran: Ran, seen: StepSeen | None) -> None:
    """After everything that is gated exactly; with a step more where the counted ones did not hold the widest batch."""
    if not session.options.audit:
        return
    session.phase("audit")
    case, notes = session.case, session.notes
    step = audited_step(program) if seen is None else seen
    session.audit_model(program.model)
    session.audit |= trainable_facts(case, program.model, notes)
    session.audit |= training_facts(case, workload, program, ran, step, notes)
    session.audit |= loss_facts(program.loss, step.loss, notes)
    session.audit |= attention_facts(case, ran.operators, session.device, notes)


def _busy(session: Session, program: FinetuneProgram) -> None:
    note_compilations(session)
    program.go_to(0)
    busy_s = profile_steps(session, program)
    if busy_s is None:
        return
    step_s = session.metrics["step_s"].value
    session.metrics["busy_share"] = ratio(busy_s / step_s, note=bound_by(busy_s / step_s))
    _share_of_matmul(session, step_s)


def _energy(session: Session, program: FinetuneProgram) -> None:
    """It takes as many steps as two seconds hold: what comes after must not depend on how many those were."""
    with weights_kept(program.model) if session.on_gpu and session.options.profile else contextlib.nullcontext():
        note_step_energy(session, program)


def bound_by(share: float) -> str:
    """Words for the share of wall time in which the device worked."""
    return "device-bound" if share >= 0.9 else "launch-bound: the device waits for the host"


def _share_of_matmul(session: Session, step_s: float) -> None:
    model, workload = session.case.model, session.case.workload
    assert model is not None
    assert isinstance(workload, FinetuneSpec)
    dtype = "bfloat16" if workload.precision == "autocast-bf16" else model.dtype
    ceiling = session.job.ceilings.get(f"matmul_{dtype}_flop_per_s")
    shape = model.sizes
    if shape is None or ceiling is None or workload.data.source != "random":
        return
    adapter = session.case.adapter
    if adapter is not None and not set(adapter.targets) <= set(shape.linear_shapes()):
        return  # an adapter elsewhere, on the head for one: no closed form
    needed = train_flops(shape, workload.batch, workload.length, adapter)
    session.metrics["mfu"] = ratio(
        needed / step_s / ceiling, note="FLOPs without recomputation over wall time and the measured matmul rate"
    )


def _learning(session: Session, program: FinetuneProgram, workload: FinetuneSpec) -> None:
    """Whether losses are finite, and whether those of the same batches fell from the warm-up to the last timed pass."""
    odd = [loss for loss in session.losses if not math.isfinite(loss)]
    session.audit["losses_finite"] = Fact(asked=True, seen=not odd)
    if odd:
        # JSON has no NaN; the audit says that there were some.
        session.losses = [loss for loss in session.losses if math.isfinite(loss)]
        return
    distinct = len(program.batches)
    warm_up = len(session.losses) - workload.steps
    same = min(distinct, warm_up)
    begin = (workload.steps // distinct - 1) * distinct  # of the last whole pass
    last = session.losses[warm_up + begin : warm_up + begin + same]
    note = f"mean over the same {same} batches"
    session.metrics["loss_first"] = reported(statistics.fmean(session.losses[:same]), "nats", note=note)
    session.metrics["loss_last"] = reported(statistics.fmean(last), "nats", note=note)
