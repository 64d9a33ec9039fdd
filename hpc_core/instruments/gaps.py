"""When the device had nothing to do, and how much of that the host spent in something of ours.

The profiler's records and `time.time_ns` may run on different clocks. So every reading begins with a launch between two looks at the host's
clock: its record says how far the clocks are apart, to within the time between the looks.
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
"""So much may lie between the two looks: 100 µs, below a wait that matters. A launch takes some 5 µs."""
_TRIES = 3
Window = tuple[int, int]


@dataclass(frozen=True)
class Idle:
    """Totals over the work between its first device record and its last."""

    span_s: float
    busy_s: float
    idle_s: float
    """In which no kernel, copy or memset ran."""
    within_s: float
    """Of these, in which the host was in one of the windows."""
    copies_apart: bool | None
    """Whether every copy to the device ran on a stream without kernels; None without such a copy."""


def idle_while(work: Callable[[], tuple[int, Sequence[Window]]], device: torch.device) -> Idle:
    """Run `work` under the profiler; it returns since when to look, and when the host was busy with what is looked for, by `time.time_ns`.

    Raises:
        MeasureError: three times in a row a reading was incomplete, or did not show how the clocks lie to each other.
    """
    problem = ""
    for _ in range(_TRIES):
        results: list[tuple[int, Sequence[Window]]] = []
        looks: list[int] = []

        def watched(results: list[tuple[int, Sequence[Window]]] = results, looks: list[int] = looks) -> None:
            looks.append(time.time_ns())
            torch.cuda._sleep(_CYCLES)
            looks.append(time.time_ns())
            results.append(work())

        intervals, calls = sorted_events(recorded(watched, device))
        ordered = kinds(calls)
        try:
            summarize(intervals, ordered.count("launch"), ordered.count("graph"))
            offset = offset_ns(calls, (looks[0], looks[1]))
        except MeasureError as error:
            problem = str(error)
            continue
        # The sentinels at the ends and our own launch are no work.
        work_of = sorted(intervals, key=lambda one: one.start_ns)[1:-1]
        since, windows = results[0]
        shifted = [(start + offset, stop + offset) for start, stop in windows]
        own = [one for one in work_of if "spin_kernel" not in one.name]
        return idle_within(own, shifted, since_ns=since + offset)
    raise MeasureError(f"{problem} Tried {_TRIES} times; idle time of this run is void.")


def offset_ns(calls: Iterable[HostCall], looks: Window) -> int:
    """What to add to the host's clock to get the profiler's, by the second launch of a profile, which was made between two looks.

    Raises:
        MeasureError: the looks lie too far apart to say, or there is no second launch.
    """
    launches = [call for call in sorted(calls, key=lambda one: one.start_ns) if kinds([call]) == ["launch"]]
    # By correlation: one launch can be two records, the runtime's and the driver's. The first is the sentinel's.
    numbers = list(dict.fromkeys(call.correlation for call in launches))
    if len(numbers) < 2:
        raise MeasureError("The launch that tells the profiler's clock was not recorded.")
    if looks[1] - looks[0] > _APART_NS:
        took = (looks[1] - looks[0]) / 1e3
        raise MeasureError(
            f"A launch took {took:,.0f} µs, so the clocks cannot be laid beside each other to {_APART_NS / 1e3:.0f} µs."
        )
    return next(call.start_ns for call in launches if call.correlation == numbers[1]) - looks[0]


def idle_within(intervals: Sequence[Interval], windows: Iterable[Window], *, since_ns: int = 0) -> Idle:
    """The gaps between these device records from `since_ns` on, and their overlap with the windows, which may overlap each other.

    Raises:
        MeasureError: there is no record since then.
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
    # A replayed graph's own copies count as computing: they are on the stream of the step.
    computing = {one.stream for one, is_copy in zip(intervals, to_device, strict=True) if not is_copy}
    apart = all(one.stream not in computing for one in copies) if copies else None
    return Idle(span, busy, max(span - busy, 0.0), max(within, 0.0), apart)
