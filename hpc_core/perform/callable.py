"""Measure a step of the user's own: wall time, peak memory, operators, FLOPs, GPU-busy time."""

from __future__ import annotations

from hpc_core.measure.clock import seconds_of
from hpc_core.measure.counters import counting
from hpc_core.perform.memory import measure_memory
from hpc_core.perform.metrics import busy, counted, ratio, wall
from hpc_core.perform.session import Session
from hpc_core.program import Program
from hpc_core.record import Record
from hpc_core.run.callable import load_factory
from hpc_core.spec import CallableSpec

__all__ = ["measure_callable", "measure_program"]

_BUSY_STEPS = 10


def measure_callable(session: Session, workload: CallableSpec) -> Record:
    """Import the factory, make the step, and measure it."""
    session.phase("build")
    return measure_program(session, load_factory(workload, session.device.type), workload.steps)


def measure_program(session: Session, program: Program, steps: int) -> Record:
    """Warm up, time `steps` steps, and take each instrument in turn, the profiler last."""
    session.warm_up(program)
    with session.timing():
        samples = [seconds_of(program.step, session.device) for _ in range(steps)]
    session.metrics["step_s"] = wall(samples)
    measure_memory(session, program, None, None)
    session.phase("counters")
    with counting() as counts:
        program.step()
    session.metrics["operators"] = counted(counts.total, machine=session.on_gpu)
    session.metrics["flops"] = counted(counts.flops, unit="FLOP", machine=session.on_gpu)
    session.phase("busy")

    def work() -> None:
        for _ in range(_BUSY_STEPS):
            program.step()

    activity = session.busy(work)
    if activity is not None:
        session.metrics["busy_s"] = busy(activity.busy_s / _BUSY_STEPS)
        session.metrics["busy_share"] = ratio(activity.busy_s / _BUSY_STEPS / session.metrics["step_s"].value)
        for name in ("kernels", "copies", "memsets"):
            session.metrics[name] = counted(getattr(activity, name), machine=True, unit=f"1 per {_BUSY_STEPS} steps")
    return session.record()
