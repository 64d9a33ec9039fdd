"""Measure a step of the user's own: wall time, peak memory, operators, FLOPs, GPU-busy time."""

from __future__ import annotations

from hpc_core.case.case import CallableSpec
from hpc_core.engines.callable import load_factory
from hpc_core.instruments.clock import seconds_of
from hpc_core.instruments.counters import counting
from hpc_core.instruments.program import Program
from hpc_core.record.job import Repeat, Retime, Trace
from hpc_core.record.record import Record
from hpc_core.worker.attributed import note_profile
from hpc_core.worker.energy import note_step_energy
from hpc_core.worker.memory import measure_memory
from hpc_core.worker.metrics import counted, ratio, wall
from hpc_core.worker.profiled import note_compilations, profile_steps, wall_only
from hpc_core.worker.session import Session
from hpc_core.worker.trace import trace_program

__all__ = ["measure_again", "measure_callable", "measure_program"]


def measure_callable(session: Session, workload: CallableSpec) -> Record:
    """Import the factory, make the step, and measure it."""
    session.phase("build")
    return measure_program(session, load_factory(workload, session.device.type), workload.steps)


def measure_program(session: Session, program: Program, steps: int) -> Record:
    """Warm up, time `steps` steps, and take each instrument in turn, the profiler last."""
    session.warm_up(program)
    if isinstance(session.kind, Trace):
        return trace_program(session, program, session.kind)
    if isinstance(session.kind, Repeat):
        return measure_again(session, program, steps)
    with session.timing():
        samples = [seconds_of(program.step, session.device) for _ in range(steps)]
    session.metrics["step_s"] = wall(samples)
    if isinstance(session.kind, Retime):
        profile_steps(session, program)
        return session.record()
    measure_memory(session, program, None, None)
    session.phase("counters")
    with counting() as counts:
        program.step()
    session.metrics["operators"] = counted(counts.total, machine=session.on_gpu)
    session.metrics["flops"] = counted(counts.flops, unit="FLOP", machine=session.on_gpu)
    note_compilations(session)
    busy_s = profile_steps(session, program)
    if busy_s is not None:
        session.metrics["busy_share"] = ratio(busy_s / session.metrics["step_s"].value)
    note_step_energy(session, program)
    note_profile(session, program, "one step")
    return session.record()


def measure_again(session: Session, program: Program, steps: int) -> Record:
    """What a further process measures of a warm program: busy time and launches, or on a CPU `steps` by the clock."""
    if session.on_gpu:
        profile_steps(session, program)
    else:
        wall_only(session, program, steps)
    return session.record()
