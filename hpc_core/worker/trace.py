"""Profile a warm program for the eye: a table of operators, a trace, a memory snapshot, or NVTX ranges for NVIDIA's tools.

Such a run is none of the measured ones: its record is invalid and says why.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch

from hpc_core.case.errors import SpecError
from hpc_core.instruments.clock import quiet, synchronize
from hpc_core.instruments.kernels import is_wait, one_cycle
from hpc_core.instruments.program import Program
from hpc_core.instruments.trace import PREFIX, named_ranges
from hpc_core.record.job import OperatorTime, Trace, TraceTable
from hpc_core.record.record import Record
from hpc_core.worker.session import Session

__all__ = ["trace_program"]

_TOP = 30
_SNAPSHOT_ENTRIES = 1_000_000


def trace_program(session: Session, program: Program, trace: Trace) -> Record:
    """Run a step of the program as `trace` asks, write what was asked for, and close the session.

    Raises:
        SpecError: the program has no such phase, or NVTX is asked for without a GPU.
    """
    session.reasons.append("This run was profiled: nothing of it is a measurement.")
    if trace.phase is not None and trace.phase not in program.phases:
        raise SpecError(f"{session.case.id} has no phase {trace.phase!r}. Its phases are: {', '.join(program.phases)}.")
    session.phase("profile")
    if trace.ranges:
        _ranges(session, program, trace)
        return session.record()
    folder = Path(trace.folder)
    folder.mkdir(parents=True, exist_ok=True)
    table = _operators(session, program, trace.phase, folder)
    if session.on_gpu:
        _snapshot(session, program, folder / "memory.pickle")
    (folder / "operators.json").write_bytes(msgspec.json.format(msgspec.json.encode(table), indent=2) + b"\n")
    return session.record()


def _ranges(session: Session, program: Program, trace: Trace) -> None:
    """Steps between the marks that NVIDIA's tools begin and end at, with NVTX ranges and no profiler of ours."""
    if not session.on_gpu:
        raise SpecError(f"{session.case.id} runs on a CPU here: NVTX ranges are for NVIDIA's tools, which need a GPU.")
    with named_ranges(nvtx=True) as ranges, quiet():
        synchronize(session.device)
        torch.cuda.profiler.start()
        for _ in range(trace.steps):
            program.step(ranges)
            ranges.end_phase()
        synchronize(session.device)
        torch.cuda.profiler.stop()


def _operators(session: Session, program: Program, phase: str | None, folder: Path) -> TraceTable:
    """One step under torch's profiler, or only one phase of it; the trace is written into the folder."""
    kinds = torch.profiler.ProfilerActivity
    activities = [kinds.CPU, kinds.CUDA] if session.on_gpu else [kinds.CPU]
    profiler = one_cycle(activities, record_shapes=True)
    window = _Window(profiler, phase, session)
    with named_ranges(nvtx=False, heard=window.phase_begins) as ranges, quiet():
        if phase is None:
            window.open()
        program.step(ranges)
        ranges.end_phase()
        window.close()
    profiler.export_chrome_trace(str(folder / "trace.json.gz"))
    return _table(profiler.key_averages(), by_device=session.on_gpu, phase=phase)


class _Window:
    """The part of a step that the profiler sees."""

    def __init__(self, profiler: Any, phase: str | None, session: Session):
        self._profiler, self._phase, self._session = profiler, phase, session
        self._state = "before"

    def phase_begins(self, name: str) -> None:
        if name == self._phase and self._state == "before":
            self.open()
        elif self._phase is not None and self._state == "open":
            self.close()

    def open(self) -> None:
        synchronize(self._session.device)
        self._profiler.start()
        self._state = "open"

    def close(self) -> None:
        if self._state == "open":
            synchronize(self._session.device)
            self._profiler.stop()
        self._state = "closed"


def _table(events: Any, *, by_device: bool, phase: str | None) -> TraceTable:
    """The operators with the most time of their own, on the device or else on the host."""
    found, kernels_s = [], 0.0
    for event in events:
        if event.key.startswith((PREFIX, "ProfilerStep", "Activity Buffer")):
            continue
        if event.device_type == torch._C._autograd.DeviceType.CUDA:
            # A range that somebody named (torch's optimizers do) spans kernels that have their own rows, and waiting is no work.
            if not event.is_user_annotation and not is_wait(event.key):
                kernels_s += event.self_device_time_total / 1e6  # counted again at the operator that launched it
            continue
        own, whole = (
            (event.self_device_time_total, event.device_time_total)
            if by_device
            else (event.self_cpu_time_total, event.cpu_time_total)
        )
        if own > 0:
            found.append(OperatorTime(name=event.key, calls=int(event.count), own_s=own / 1e6, whole_s=whole / 1e6))
    found.sort(key=lambda each: (-each.own_s, each.name))
    total_s = kernels_s if by_device else sum(each.own_s for each in found)
    return TraceTable(
        device="cuda" if by_device else "cpu", phase=phase, total_s=total_s, operators=tuple(found[:_TOP])
    )


def _snapshot(session: Session, program: Program, path: Path) -> None:
    """Every allocation of one step with its Python stack, as https://pytorch.org/memory_viz reads it."""
    torch.cuda.memory._record_memory_history(stacks="python", max_entries=_SNAPSHOT_ENTRIES)
    try:
        with quiet():
            program.step()
            synchronize(session.device)
        torch.cuda.memory._dump_snapshot(str(path))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
