"""Energy of a step or of a new token: the whole board's, over two seconds of the very steps or queries that were timed before."""

from __future__ import annotations

from collections.abc import Callable

from hpc_core.case.errors import MeasureError
from hpc_core.engines.generate import GenerateProgram
from hpc_core.instruments.clock import quiet, synchronize
from hpc_core.instruments.energy import Energy, energy_of
from hpc_core.instruments.program import Program
from hpc_core.record.environment import gpu_energy_mj, gpu_state
from hpc_core.record.gpu_state import other_processes
from hpc_core.worker.metrics import reported
from hpc_core.worker.session import Session

__all__ = ["note_step_energy", "note_token_energy", "taken"]

_MOST_S = 10.0
"""What a whole round of unlike steps or queries may take; beyond, the first ones speak for the others."""


def note_step_energy(session: Session, program: Program) -> None:
    """`energy_step_j`: joules of a training step, or of a step of the user's own. Steps go on from where the program stands."""

    def step() -> None:
        program.step()
        synchronize(session.device)

    energy = _measured(session, step, _round(session, "step_s", program.period))
    if energy is not None:
        session.metrics["energy_step_j"] = reported(
            energy.joules / energy.times, "J", note=taken(energy, "steps", program.period)
        )


def note_token_energy(session: Session, program: GenerateProgram) -> None:
    """`energy_token_j`: joules of a query over its new tokens of all rows, prefill included."""
    made = 0

    def query() -> None:
        nonlocal made
        program.step()
        synchronize(session.device)
        made += sum(map(len, program.answer_ids()))

    program.steps_done = 0
    energy = _measured(session, query, _round(session, "query_s", program.period))
    if energy is not None:
        note = f"{made:,} new tokens, prefill included; {taken(energy, 'queries', program.period)}"
        session.metrics["energy_token_j"] = reported(energy.joules / made, "J", note=note)


def taken(energy: Energy, what: str, period: int) -> str:
    """What the number covers, in words; `period` is how many unlike steps or queries there are."""
    part = f" of {period:,} unlike ones" if energy.times % period else ""
    return (
        f"whole board, idle power not subtracted: {energy.joules:,.0f} J over {energy.seconds:.2f} s and {energy.times} {what}{part}, "
        f"{energy.watts:.0f} W; the readings' age alone may move it by {energy.doubt:.0%}"
    )


def _round(session: Session, metric: str, period: int) -> int:
    """How many steps or queries make a round, where that takes no more than ten seconds."""
    timed = session.metrics.get(metric)
    return period if timed is not None and timed.value * period <= _MOST_S else 1


def _measured(session: Session, step: Callable[[], None], whole: int) -> Energy | None:
    """Joules of repeated steps on a GPU; None, with a note that says why, where the board's counter does not speak of them.

    A job that only compares (A/B, A/A, faults) has no use for it and is spared the seconds.
    """
    if not session.on_gpu or not session.options.profile:
        return None
    session.phase("energy")
    if gpu_state().get("mig_mode"):
        session.notes.append("no energy: the counter is of the whole board, and MIG gives this process a slice")
        return None
    try:
        with quiet():
            energy = energy_of(step, gpu_energy_mj, whole=whole)
    except MeasureError as error:
        session.notes.append(f"no energy: {error}")
        return None
    others = other_processes(session.gpu_before, gpu_state())
    if others > 0:
        session.notes.append(
            f"no energy: the counter is of the whole board, and {others} other process{'es' if others > 1 else ''} used it too"
        )
        return None
    return energy
