"""Profile a warm program for people to read: a table of operators, a trace, a memory snapshot, or NVTX ranges for NVIDIA's tools.

Such a run is not a measurement: its record is INVALID and says why.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch.nn.modules import module as hooks

from hpc_core.case.errors import SpecError
from hpc_core.instruments.clock import quiet, synchronize
from hpc_core.instruments.kernels import is_wait, one_cycle
from hpc_core.instruments.program import Program
from hpc_core.record.files import write_whole
from hpc_core.record.findings import Findings
from hpc_core.record.job import OperatorTime, Trace, TraceTable

PREFIX = "hpc-core:"
"""The prefix of all range names, so that tables can tell them from operators."""


def shown(name: str) -> bool:
    """Return whether a module gets a range: layers, their direct children, and modules outside layers (`lm_head`, `model.norm`)."""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return bool(name) and (not numbers or len(parts) <= numbers[0] + 2)


class Ranges:
    """Open and close ranges; the object is also the mark of a step."""

    def __init__(self, *, nvtx: bool, on_phase: Callable[[str], None] | None = None):
        self._nvtx = nvtx
        self._on_phase = on_phase
        self._names: dict[int, tuple[str, torch.nn.Module]] = {}
        self._open: list[tuple[int, Any]] = []
        self._phase: Any = None

    def __call__(self, phase: str) -> None:
        """End the current phase and begin this one."""
        self.end_phase()
        if self._on_phase is not None:
            self._on_phase(phase)
        self._phase = self._begin(phase)

    def end_phase(self) -> None:
        """End the current phase."""
        if self._phase is not None:
            self._end(self._phase)
        self._phase = None

    def before_forward(self, module: torch.nn.Module, _: Any) -> None:
        """Open a range for a module's forward."""
        if id(module) not in self._names:
            for name, each in module.named_modules():
                self._names.setdefault(id(each), (name, each))
        name = self._names[id(module)][0]
        if shown(name):
            self._open.append((id(module), self._begin(name)))

    def after_forward(self, module: torch.nn.Module, _: Any, __: Any) -> None:
        """Close the range of a module's forward, and those of submodules that never reported their end."""
        if any(key == id(module) for key, _ in self._open):
            while self._open:
                key, found = self._open.pop()
                self._end(found)
                if key == id(module):
                    return

    def _begin(self, name: str) -> Any:
        if self._nvtx:
            torch.cuda.nvtx.range_push(PREFIX + name)
            return True
        found = torch.profiler.record_function(PREFIX + name)
        found.__enter__()
        return found

    def _end(self, found: Any) -> None:
        if self._nvtx:
            torch.cuda.nvtx.range_pop()
        else:
            found.__exit__(None, None, None)


@contextlib.contextmanager
def named_ranges(*, nvtx: bool, on_phase: Callable[[str], None] | None = None) -> Iterator[Ranges]:
    """Put a range around every module's forward while the block runs. `on_phase` is called with each phase as it begins.

    With `nvtx`, the backward runs in the calling thread. An NVTX range belongs to one thread, and autograd runs the backward on
    a GPU in threads of its own, so no kernel of it would be in its phase's range (nsys shows none there, ncu finds none).
    """
    ranges = Ranges(nvtx=nvtx, on_phase=on_phase)
    handles = (
        hooks.register_module_forward_pre_hook(ranges.before_forward),
        hooks.register_module_forward_hook(ranges.after_forward, always_call=True),
    )
    try:
        with torch.autograd.set_multithreading_enabled(False) if nvtx else contextlib.nullcontext():
            yield ranges
    finally:
        ranges.end_phase()
        for handle in handles:
            handle.remove()


_TOP = 30
_SNAPSHOT_ENTRIES = 1_000_000


def trace_step(program: Program, device: torch.device, trace: Trace, case_id: str) -> Findings:
    """Profile a step of the program as `trace` asks, and write the files.

    Raises:
        SpecError: the program has no such phase, or `trace` asks for NVTX ranges without a GPU.
    """
    if trace.phase is not None and trace.phase not in program.phases:
        raise SpecError(f"{case_id} has no phase {trace.phase!r}. Its phases are: {', '.join(program.phases)}.")
    if trace.ranges:
        _ranges(program, device, trace, case_id)
    else:
        folder = Path(trace.folder)
        folder.mkdir(parents=True, exist_ok=True)
        table = _operators(program, device, trace.phase, folder)
        if device.type == "cuda":
            _snapshot(program, device, folder / "memory.pickle")
        write_whole(folder / "operators.json", msgspec.json.format(msgspec.json.encode(table), indent=2) + b"\n")
    return Findings(reasons=("This run was profiled: nothing of it is a measurement.",))


def _ranges(program: Program, device: torch.device, trace: Trace, case_id: str) -> None:
    """Run steps with NVTX ranges, without our own profiler, between the marks where NVIDIA's tools start and stop."""
    if device.type != "cuda":
        raise SpecError(f"{case_id} runs on a CPU here: NVTX ranges are for NVIDIA's tools, which need a GPU.")
    with named_ranges(nvtx=True) as ranges, quiet():
        synchronize(device)
        torch.cuda.profiler.start()
        for _ in range(trace.steps):
            program.step(ranges)
            ranges.end_phase()
        synchronize(device)
        torch.cuda.profiler.stop()


def _operators(program: Program, device: torch.device, phase: str | None, folder: Path) -> TraceTable:
    """Run one step under torch's profiler, or only one phase of it, and write the trace into the folder."""
    kinds = torch.profiler.ProfilerActivity
    activities = [kinds.CPU, kinds.CUDA] if device.type == "cuda" else [kinds.CPU]
    profiler = one_cycle(activities, record_shapes=True)
    window = _Window(profiler, phase, device)
    with named_ranges(nvtx=False, on_phase=window.phase_begins) as ranges, quiet():
        if phase is None:
            window.open()
        program.step(ranges)
        ranges.end_phase()
        window.close()
    profiler.export_chrome_trace(str(folder / "trace.json.gz"))
    return _table(profiler.key_averages(), by_device=device.type == "cuda", phase=phase)


class _Window:
    """The part of a step that the profiler records."""

    def __init__(self, profiler: Any, phase: str | None, device: torch.device):
        self._profiler, self._phase, self._device = profiler, phase, device
        self._state = "before"

    def phase_begins(self, name: str) -> None:
        if name == self._phase and self._state == "before":
            self.open()
        elif self._phase is not None and self._state == "open":
            self.close()

    def open(self) -> None:
        synchronize(self._device)
        self._profiler.start()
        self._state = "open"

    def close(self) -> None:
        if self._state == "open":
            synchronize(self._device)
            self._profiler.stop()
        self._state = "closed"


def _table(events: Any, *, by_device: bool, phase: str | None) -> TraceTable:
    """Return the operators with the most self time, on the device if there is one, else on the host."""
    found, kernels_s = [], 0.0
    for event in events:
        if event.key.startswith((PREFIX, "ProfilerStep", "Activity Buffer")):
            continue
        if event.device_type == torch._C._autograd.DeviceType.CUDA:
            # Kernels inside an annotation (torch's optimizers make some) have rows of their own, and waits are not work.
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


def _snapshot(program: Program, device: torch.device, path: Path) -> None:
    """Write every allocation of one step with its Python stack, for https://pytorch.org/memory_viz."""
    torch.cuda.memory._record_memory_history(stacks="python", max_entries=_SNAPSHOT_ENTRIES)
    try:
        with quiet():
            program.step()
            synchronize(device)
        torch.cuda.memory._dump_snapshot(str(path))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
