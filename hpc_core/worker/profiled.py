"""Busy time and launches of a number of steps or queries, and what of them becomes a metric."""

from __future__ import annotations

import sys
from typing import Any

from hpc_core.instruments.clock import seconds_of
from hpc_core.instruments.kernels import DeviceActivity, families_of, mark_step
from hpc_core.instruments.program import Program
from hpc_core.record.job import Repeat
from hpc_core.record.record import KernelFamily
from hpc_core.worker.metrics import busy, counted, wall
from hpc_core.worker.session import Session

__all__ = ["BUSY_STEPS", "note_compilations", "note_counts", "profile_steps", "wall_only"]

BUSY_STEPS = 10
"""Kernels, copies, memsets and synchronizations are totals over so many steps, and busy time is their mean."""
_SHORT_STEPS = 5
"""Enough in a further process, if each of them launched as often as the others: then ten launch twice as often."""
_COUNTS = ("kernels", "copies", "memsets", "synchronizations")


def profile_steps(session: Session, program: Program) -> float | None:
    """`busy_s` and the counts over ten steps into the session's metrics. The busy seconds of a step; None without a reading.

    Counts are totals over ten steps, not means: a kernel that only every second step launches must not vanish in a division. In a
    further process five steps do where all five are alike, which is checked; their counts are then doubled.
    """
    session.phase("busy")
    if isinstance(session.kind, Repeat) and program.period == 1 and session.on_gpu:
        activity = _profile(session, program, _SHORT_STEPS, marked=True)
        if activity is None or activity.steps_alike:
            return _noted(session, activity, _SHORT_STEPS)
    return _noted(session, _profile(session, program, BUSY_STEPS, marked=False), BUSY_STEPS)


def _profile(session: Session, program: Program, steps: int, *, marked: bool) -> DeviceActivity | None:
    def work() -> None:
        for _ in range(steps):
            program.step()
            if marked:
                mark_step(session.device)

    return session.busy(work, marked_steps=steps if marked else 0)


def _noted(session: Session, activity: DeviceActivity | None, steps: int) -> float | None:
    if activity is None:
        return None
    busy_s = activity.busy_s / steps
    session.metrics["busy_s"] = busy(busy_s)
    note_counts(session, activity, unit=f"1 per {BUSY_STEPS} steps", times=BUSY_STEPS // steps)
    return busy_s


def note_counts(session: Session, activity: DeviceActivity, *, unit: str, times: int = 1) -> None:
    """Kernels, copies, memsets and synchronizations of this work, `times` over, as metrics; its kernels by family beside them."""
    for name in _COUNTS:
        session.metrics[name] = counted(getattr(activity, name) * times, machine=True, unit=unit)
    session.kernel_families = {
        name: KernelFamily(seconds=seconds * times, kernels=kernels * times)
        for name, (seconds, kernels) in families_of(activity.kernel_s, activity.kernel_counts).items()
    }


def note_compilations(session: Session) -> None:
    """`graph_breaks` and `recompilations` of torch.compile in this process so far: 0 where nothing is compiled.

    Gated on a GPU, where compiling is what it is done for; shown on a CPU. Dynamo remembers its last 64 compilations.
    """
    dynamo: Any = sys.modules.get("torch._dynamo.utils")
    breaks = 0 if dynamo is None else sum(dynamo.counters["graph_break"].values())
    made = () if dynamo is None else dynamo.get_compilation_metrics()
    again = sum(getattr(each, "recompile_reason", None) is not None for each in made)
    for name, value in (("graph_breaks", breaks), ("recompilations", again)):
        session.metrics[name] = counted(int(value), machine=True, gated=session.on_gpu)


def wall_only(session: Session, program: Program, steps: int) -> None:
    """`step_s` of a further process on a CPU, where there is no busy time: at most ten steps."""
    with session.timing():
        samples = [seconds_of(program.step, session.device) for _ in range(min(steps, BUSY_STEPS))]
    session.metrics["step_s"] = wall(samples)
