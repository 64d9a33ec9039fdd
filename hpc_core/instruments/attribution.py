"""Which kernels ran for which operator of which module: every operator is a named range on the host, every launch lies in one.

A pass of its own: the ranges cost host time, so neither wall time nor gaps are read from it. How long a kernel runs does not
depend on when the host launched it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hpc_core.instruments.clock import quiet, synchronize
from hpc_core.instruments.kernels import family, is_wait, one_cycle
from hpc_core.record.profile import KernelUse

__all__ = ["DeviceWork", "NamedRanges", "Range", "attributed", "kernel_uses"]

_PREFIX = "hpc-core"
_SEPARATOR = "|"
_LONGEST = 160
"""Of a kernel's name; what templates write beyond it tells no two kernels of one operator apart."""


@dataclass(frozen=True)
class Range:
    """An operator on the host, from when to when in nanoseconds."""

    thread: int
    start_ns: int
    end_ns: int
    module: str
    operator: str


@dataclass(frozen=True)
class DeviceWork:
    """A kernel, copy or memset, and the call on the host that began it (None where the profiler lost it)."""

    name: str
    seconds: float
    launched: tuple[int, int] | None
    """Thread and nanoseconds."""


class NamedRanges(TorchDispatchMode):
    """While active, each operator is a range of the profiler that says for which module it runs."""

    def __init__(self, place: Callable[[], str]):
        super().__init__()
        self._place = place

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator inside its range."""
        with torch.profiler.record_function(_SEPARATOR.join((_PREFIX, self._place(), str(func)))):
            return func(*args, **(kwargs or {}))


def kernel_uses(work: Callable[[], None], device: torch.device, place: Callable[[], str]) -> tuple[KernelUse, ...]:
    """Run `work` once under the profiler, and say what the device did for which module; `place` says which is at work."""
    synchronize(device)
    kinds = torch.profiler.ProfilerActivity
    with quiet(), one_cycle([kinds.CPU, kinds.CUDA]) as profiler:
        with NamedRanges(place):
            work()
        synchronize(device)
    inner: Any = profiler.profiler
    return attributed(*sorted_events(inner.kineto_results.events()))


def sorted_events(events: Iterable[Any]) -> tuple[list[Range], list[DeviceWork]]:
    """The operators' ranges and the device's work, from the profiler's raw records."""
    cuda = torch._C._autograd.DeviceType.CUDA
    ranges: list[Range] = []
    launches: dict[int, tuple[int, int]] = {}
    on_device = []
    for event in events:
        name = event.name()
        if event.device_type() == cuda:
            if not _is_no_work(event, name):
                on_device.append(event)
        elif name.startswith(_PREFIX + _SEPARATOR):
            _, module, operator = name.split(_SEPARATOR, 2)
            ranges.append(Range(event.start_thread_id(), event.start_ns(), event.end_ns(), module, operator))
        elif name.startswith("cu"):
            launches[event.correlation_id()] = (event.start_thread_id(), event.start_ns())
    work = [
        DeviceWork(event.name(), (event.end_ns() - event.start_ns()) / 1e9, launches.get(event.correlation_id()))
        for event in on_device
    ]
    return ranges, work


def _is_no_work(event: Any, name: str) -> bool:
    return bool(event.is_user_annotation()) or is_wait(name) or name.startswith(_PREFIX + _SEPARATOR)


def attributed(ranges: Iterable[Range], work: Iterable[DeviceWork]) -> tuple[KernelUse, ...]:
    """Launches and seconds by module, operator and kernel, the most seconds first; what lies in no range is of no module."""
    by_thread: dict[int, list[Range]] = {}
    for each in sorted(ranges, key=lambda one: one.start_ns):
        by_thread.setdefault(each.thread, []).append(each)
    starts = {thread: [each.start_ns for each in found] for thread, found in by_thread.items()}
    totals: dict[tuple[str, str, str], tuple[int, float]] = {}
    for done in work:
        at = _around(done.launched, by_thread, starts)
        key = ("", "", _short(done.name)) if at is None else (at.module, at.operator, _short(done.name))
        launches, seconds = totals.get(key, (0, 0.0))
        totals[key] = (launches + 1, seconds + done.seconds)
    most = sorted(totals.items(), key=lambda each: (-each[1][1], each[0]))
    return tuple(KernelUse(*key, _family(key[2]), launches, seconds) for key, (launches, seconds) in most)


def _around(
    launched: tuple[int, int] | None, by_thread: dict[int, list[Range]], starts: dict[int, list[int]]
) -> Range | None:
    if launched is None or launched[0] not in by_thread:
        return None
    thread, moment = launched
    index = bisect_right(starts[thread], moment) - 1
    found = by_thread[thread][index] if index >= 0 else None
    return found if found is not None and moment <= found.end_ns else None


def _short(name: str) -> str:
    return name.removeprefix("void ").replace("at::native::", "")[:_LONGEST]


def _family(name: str) -> str:
    if name.startswith("Memcpy"):
        return "memcpy"
    return "memset" if name.startswith("Memset") else family(name)
