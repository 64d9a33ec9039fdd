"""What a tuned program adds to a fine-tuning case: a captured step's memory, and whether each switch is on."""

from __future__ import annotations

from hpc_core.audit import tuned_facts
from hpc_core.engines.finetune import FinetuneProgram
from hpc_core.engines.tuned.program import TunedProgram
from hpc_core.record.record import Fact
from hpc_core.worker.metrics import measured_bytes
from hpc_core.worker.session import Session

__all__ = ["audit_switches", "audit_tuned", "measure_graph_memory", "recomputed_attentions"]

_WITHIN = 0.01
"""Relative. The same weights and batch give the same loss but for the order of sums, which a replay does not change."""


def measure_graph_memory(session: Session, program: FinetuneProgram) -> None:
    """`peak_bytes` of a captured step: the peak of capture and replay with the graph's private pool, in place of the watched step's."""
    if not isinstance(program, TunedProgram) or program.captured is None:
        return
    pool, _ = program.captured.pool_bytes()
    watched = session.metrics["peak_bytes"].value
    note = f"capture and replay with the graph's pool of {pool:,} bytes; the same step without a graph {int(watched):,}"
    peak = program.captured.peak_bytes()
    session.metrics["peak_bytes"] = measured_bytes(peak, machine=True, note=note)
    session.metrics["graph_pool_bytes"] = measured_bytes(pool, machine=True, gated=False)


def audit_switches(session: Session, program: FinetuneProgram) -> None:
    """Facts of the engine and its switches: what was called and captured so far. Runs nothing."""
    if isinstance(program, TunedProgram) and session.options.audit:
        session.audit |= tuned_facts(program, session.notes)


def audit_tuned(session: Session, program: FinetuneProgram) -> None:
    """Facts of the engine and its switches, of the budget, and of a replay against the same step without a graph. Still in the phase audit."""
    if not isinstance(program, TunedProgram) or not session.options.audit:
        return
    audit_switches(session, program)
    budget = program.workload.budget_bytes
    if budget is not None:
        peak = int(session.metrics["peak_bytes"].value)
        asked = f"at most {budget:,} bytes"
        session.audit["budget"] = Fact(asked=asked, seen=asked if peak <= budget else f"{peak:,} bytes")
    adapter = session.case.adapter
    if program.captured is not None and (adapter is None or not adapter.dropout):  # dropout draws anew each time
        session.audit["graph_step"] = _replay_against_plain(program)


def _replay_against_plain(program: TunedProgram) -> Fact:
    """The loss of a replayed step against that of a forward without a graph, on the same weights and batch."""
    program.steps_done = program.widest
    batch = program.batches[program.widest]
    # With a graph of autograd, as in the step: without one, compiled layers would compile again.
    plain = float(program.model(input_ids=batch.ids, labels=batch.labels, attention_mask=batch.mask).loss.detach())
    program.step()
    replayed = float("nan") if program.loss is None else float(program.loss)
    asked = "the loss of the same step without a graph"
    near = abs(replayed - plain) <= _WITHIN * abs(plain)
    return Fact(asked=asked, seen=asked if near else f"{replayed:.6g}, without a graph {plain:.6g}")


def recomputed_attentions(program: FinetuneProgram) -> int | None:
    """How many layers' attentions a step computes again by its budget; None without one."""
    plan = program.plan if isinstance(program, TunedProgram) else None
    return None if plan is None else plan.attentions
