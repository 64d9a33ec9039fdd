"""GPU-busy time: the union of the intervals in which a kernel, copy or memset ran, seen by the profiler.

Only device activity is recorded, no operators, no annotations, no synchronization events. A reading counts only when
sentinel kernels are seen at both ends and every launch has its kernel: the profiler can drop early records in silence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from hpc_core.case.errors import MeasureError
from hpc_core.instruments.clock import quiet, synchronize
from hpc_core.instruments.host_calls import (
    MARKS,
    HostCall,
    kinds,
    made_between,
    steps_alike,
    synchronizations,
)
from hpc_core.instruments.one_cycle import one_cycle

__all__ = ["DeviceActivity", "device_activity", "is_wait", "mark_step", "summarize", "union_s"]

_SENTINEL = "spin_kernel"
"""The kernel behind torch.cuda._sleep."""
_SENTINEL_CYCLES = 20_000
_TRIES = 3


@dataclass(frozen=True)
class Interval:
    """One device record: what ran, on which stream, from when to when in nanoseconds."""

    name: str
    kind: str
    """kernel, copy or memset."""
    stream: int
    start_ns: int
    end_ns: int
    graph: int = 0
    """Correlation number of the CUDA graph's launch that this was part of; 0 for what was launched by itself."""


@dataclass(frozen=True)
class DeviceActivity:
    """What the device did over `steps` steps; every field is a total over them."""

    busy_s: float
    stream_s: dict[int, float]
    """Busy seconds by stream; they add up to more than busy_s where streams overlap."""
    kernels: int
    copies: int
    memsets: int
    kernel_s: dict[str, float]
    """Seconds by kernel name."""
    kernel_counts: dict[str, int]
    synchronizations: int = 0
    """How often the host waited for the device."""
    steps_alike: bool = False
    """Every step that `mark_step` ended made the host launch, copy, fill and wait as often as the others."""


def mark_step(device: torch.device) -> None:
    """Say in the profile that a step has ended, without waiting and without work for the device."""
    stream = torch.cuda.current_stream(device)
    for _ in range(MARKS):
        stream.query()


def device_activity(work: Callable[[], None], device: torch.device, *, marked_steps: int = 0) -> DeviceActivity:
    """Run `work` under the profiler and say what the device did; `marked_steps` are those whose end `work` marks.

    Raises:
        MeasureError: three times in a row the reading was incomplete.
    """
    trouble = ""
    for _ in range(_TRIES):
        intervals, calls = _sort(_record(work, device))
        ordered = kinds(calls)
        try:
            activity = summarize(intervals, ordered.count("launch"), ordered.count("graph"))
        except MeasureError as error:
            trouble = str(error)
            continue
        between = made_between(ordered)
        alike = marked_steps > 0 and steps_alike(between, marked_steps)
        return replace(activity, synchronizations=synchronizations(between), steps_alike=alike)
    raise MeasureError(f"{trouble} Tried {_TRIES} times; busy time and kernel counts of this run are void.")


def _record(work: Callable[[], None], device: torch.device) -> list[Any]:
    synchronize(device)
    with quiet(), one_cycle([torch.profiler.ProfilerActivity.CUDA]) as profiler:
        torch.cuda._sleep(_SENTINEL_CYCLES)
        synchronize(device)
        work()
        torch.cuda._sleep(_SENTINEL_CYCLES)
        synchronize(device)
    # The raw records: building torch's event tree for fifty thousand kernels would take longer than the case.
    inner: Any = profiler.profiler
    return list(inner.kineto_results.events())


def _sort(events: Iterable[Any]) -> tuple[list[Interval], list[HostCall]]:
    """Device records as intervals, and the host's calls of the CUDA runtime."""
    intervals: list[Interval] = []
    calls: list[HostCall] = []
    of_call: list[int] = []
    cuda = torch._C._autograd.DeviceType.CUDA
    for event in events:
        name = event.name()
        if event.device_type() == cuda:
            kind = _kind(event, name)
            if kind is not None:
                intervals.append(Interval(name, kind, event.device_resource_id(), event.start_ns(), event.end_ns()))
                of_call.append(event.correlation_id())
        elif name.startswith("cu"):
            calls.append(HostCall(name, event.correlation_id(), event.start_ns()))
    graphs = {call.correlation for call in calls if kinds([call]) == ["graph"]}
    marked = [
        replace(interval, graph=number) if number in graphs else interval
        for interval, number in zip(intervals, of_call, strict=True)
    ]
    return marked, calls


def _kind(event: Any, name: str) -> str | None:
    if event.is_user_annotation() or is_wait(name):
        return None
    if name.startswith("Memcpy"):
        return "copy"
    return "memset" if name.startswith("Memset") else "kernel"


def is_wait(name: str) -> bool:
    """Whether the profiler's record of this name is a wait or a mark on the device: it takes time there and does no work."""
    return name.endswith(" Sync") or name.startswith(("Stream Wait", "Event Record"))


def summarize(intervals: list[Interval], launches: int, graphs: int = 0) -> DeviceActivity:
    """The totals between the sentinels, which themselves do not count; `graphs` is how many CUDA graphs were launched.

    Raises:
        MeasureError: a sentinel is missing, or launches and kernels differ in number, or a graph left no kernel.
    """
    ordered = sorted(intervals, key=lambda interval: interval.start_ns)
    ends = [interval for interval in (*ordered[:1], *ordered[1:][-1:]) if _SENTINEL in interval.name]
    kernels = [interval for interval in ordered if interval.kind == "kernel"]
    if len(ends) != 2:
        raise MeasureError(
            f"Of {len(ordered):,} device records {len(ends)} of 2 ends are sentinel kernels: some records are missing."
        )
    alone = sum(not kernel.graph for kernel in kernels)
    if alone != launches:
        raise MeasureError(f"The host launched {launches:,} kernels, the profiler recorded {alone:,}.")
    replayed = len({kernel.graph for kernel in kernels if kernel.graph})
    if replayed != graphs:
        raise MeasureError(f"The host launched {graphs:,} CUDA graphs, the profiler recorded kernels of {replayed:,}.")
    work = ordered[1:-1]
    seconds: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for interval in work:
        if interval.kind == "kernel":
            seconds[interval.name] += interval.end_ns - interval.start_ns
            counts[interval.name] += 1
    streams = {interval.stream for interval in work}
    return DeviceActivity(
        busy_s=union_s(work),
        stream_s={stream: union_s(i for i in work if i.stream == stream) for stream in sorted(streams)},
        kernels=sum(interval.kind == "kernel" for interval in work),
        copies=sum(interval.kind == "copy" for interval in work),
        memsets=sum(interval.kind == "memset" for interval in work),
        kernel_s={name: value / 1e9 for name, value in seconds.most_common()},
        kernel_counts=dict(counts),
    )


def union_s(intervals: Iterable[Interval]) -> float:
    """Seconds in which at least one interval was open."""
    total, end = 0, 0
    for interval in sorted(intervals, key=lambda one: one.start_ns):
        if interval.end_ns > end:
            total += interval.end_ns - max(interval.start_ns, end)
            end = interval.end_ns
    return total / 1e9
