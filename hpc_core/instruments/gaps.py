"""Idle time of the device, and how much of it the host spent in given windows.

The profiler and `time.time_ns` may use different clocks. So every reading starts with a launch between two readings of
the host's clock; the launch's record gives the offset of the clocks, with an error of at most the time between the two.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from hpc_core.case.errors import MeasureError
from hpc_core.instruments.kernels import (
    HostCall,
    Interval,
    kinds,
    recorded,
    sorted_events,
    summarize,
    union_s,
)

_CYCLES = 20_000
_APART_NS = 100_000
"""The most time between the two readings: 100 µs is less than any wait that matters. A launch takes about 5 µs."""
_TRIES = 3
Window = tuple[int, int]


@dataclass(frozen=True)
class Idle:
    """Seconds between the first and the last device record of the work."""

    span_s: float
    busy_s: float
    idle_s: float
    """Time in which no kernel, copy or memset ran."""
    within_s: float
    """The part of `idle_s` in which the host was in one of the windows."""
    copies_apart: bool | None
    """Whether every copy to the device ran on a stream without kernels; None without such a copy."""


def idle_while(work: Callable[[], tuple[int, Sequence[Window]]], device: torch.device) -> Idle:
    """Run `work` under the profiler. It returns its start and the windows, in nanoseconds of `time.time_ns`.

    Raises:
        MeasureError: three readings in a row were incomplete or did not give the offset of the clocks.
    """
    problem = ""
    for _ in range(_TRIES):
        results: list[tuple[int, Sequence[Window]]] = []
        clock_ns: list[int] = []

        def watched(results: list[tuple[int, Sequence[Window]]] = results, clock_ns: list[int] = clock_ns) -> None:
            clock_ns.append(time.time_ns())
            torch.cuda._sleep(_CYCLES)
            clock_ns.append(time.time_ns())
            results.append(work())

        intervals, calls = sorted_events(recorded(watched, device))
        ordered = kinds(calls)
        try:
            summarize(intervals, ordered.count("launch"), ordered.count("graph"))
            offset = offset_ns(calls, (clock_ns[0], clock_ns[1]))
        except MeasureError as error:
            problem = str(error)
            continue
        # Leave out the sentinels at both ends and our own launch.
        between_sentinels = sorted(intervals, key=lambda one: one.start_ns)[1:-1]
        since, windows = results[0]
        shifted = [(start + offset, stop + offset) for start, stop in windows]
        work_intervals = [one for one in between_sentinels if "spin_kernel" not in one.name]
        return idle_within(work_intervals, shifted, since_ns=since + offset)
    raise MeasureError(f"{problem} Tried {_TRIES} times; idle time of this run is void.")


def offset_ns(calls: Iterable[HostCall], clock_ns: Window) -> int:
    """Nanoseconds to add to the host's clock to get the profiler's.

    The second launch of the profile happened between the two readings of the host's clock in `clock_ns`.

    Raises:
        MeasureError: the two readings are too far apart, or there is no second launch.
    """
    launches = [call for call in sorted(calls, key=lambda one: one.start_ns) if kinds([call]) == ["launch"]]
    # One launch may be two records, the runtime's and the driver's, of one correlation. The first is the sentinel's.
    numbers = list(dict.fromkeys(call.correlation for call in launches))
    if len(numbers) < 2:
        raise MeasureError("The launch that gives the profiler's clock was not recorded.")
    if clock_ns[1] - clock_ns[0] > _APART_NS:
        took = (clock_ns[1] - clock_ns[0]) / 1e3
        raise MeasureError(
            f"A launch took {took:,.0f} µs, so the offset of the clocks is not known to {_APART_NS / 1e3:.0f} µs."
        )
    return next(call.start_ns for call in launches if call.correlation == numbers[1]) - clock_ns[0]


def idle_within(intervals: Sequence[Interval], windows: Iterable[Window], *, since_ns: int = 0) -> Idle:
    """The gaps between device records from `since_ns` on, and how much of them the windows, which may overlap, cover.

    Raises:
        MeasureError: no record ends after `since_ns`.
    """
    intervals = [replace(one, start_ns=max(one.start_ns, since_ns)) for one in intervals if one.end_ns > since_ns]
    if not intervals:
        raise MeasureError("No device record: nothing ran on the device.")
    begin, end = min(one.start_ns for one in intervals), max(one.end_ns for one in intervals)
    busy = union_s(intervals)
    # |gaps and windows| = |records or windows| - |records|, for windows cut to the span.
    cut = [(max(start, begin), min(stop, end)) for start, stop in windows]
    inside = [Interval("window", "window", 0, start, stop) for start, stop in cut if start < stop]
    within = union_s([*intervals, *inside]) - busy
    span = (end - begin) / 1e9
    to_device = [one.kind == "copy" and "HtoD" in one.name for one in intervals]
    copies = [one for one, is_copy in zip(intervals, to_device, strict=True) if is_copy]
    # A replayed graph's own copies count as computing, because they are on the step's stream.
    computing = {one.stream for one, is_copy in zip(intervals, to_device, strict=True) if not is_copy}
    apart = all(one.stream not in computing for one in copies) if copies else None
    return Idle(span, busy, max(span - busy, 0.0), max(within, 0.0), apart)
