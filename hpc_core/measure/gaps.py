"""When the device had nothing to do, and how much of that the host spent in something of ours: by one clock, which is checked.

The profiler's records carry nanoseconds since the epoch, as `time.time_ns` does. That is its habit and no promise, so every reading launches
a kernel between two looks at the host's clock, and is void where the record of that launch does not lie between them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from hpc_core.errors import MeasureError
from hpc_core.measure.busy import Interval, _record, _sort, summarize, union_s
from hpc_core.measure.host_calls import HostCall, kinds

__all__ = ["Idle", "idle_while", "idle_within"]

_CYCLES = 20_000
_SLACK_NS = 20_000
"""By so much the launch's record may lie outside the two looks: 20 µs, well below a wait that matters."""
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
        MeasureError: three times in a row a reading was incomplete, or the profiler's clock was not the host's.
    """
    trouble = ""
    for _ in range(_TRIES):
        told: list[tuple[int, Sequence[Window]]] = []
        looks: list[int] = []

        def watched(told: list[tuple[int, Sequence[Window]]] = told, looks: list[int] = looks) -> None:
            looks.append(time.time_ns())
            torch.cuda._sleep(_CYCLES)
            looks.append(time.time_ns())
            told.append(work())

        intervals, calls = _sort(_record(watched, device))
        ordered = kinds(calls)
        try:
            summarize(intervals, ordered.count("launch"), ordered.count("graph"))
            _check_clock(calls, (looks[0], looks[1]))
        except MeasureError as error:
            trouble = str(error)
            continue
        # The sentinels at the ends and our own launch are no work.
        work_of = sorted(intervals, key=lambda one: one.start_ns)[1:-1]
        since, windows = told[0]
        return idle_within([one for one in work_of if "spin_kernel" not in one.name], windows, since_ns=since)
    raise MeasureError(f"{trouble} Tried {_TRIES} times; idle time of this run is void.")


def _check_clock(calls: Iterable[HostCall], looks: Window) -> None:
    launches = [call for call in sorted(calls, key=lambda one: one.start_ns) if kinds([call]) == ["launch"]]
    # By correlation: one launch can be two records. The first is the sentinel's, the second ours.
    numbers = list(dict.fromkeys(call.correlation for call in launches))
    ours = next(call.start_ns for call in launches if call.correlation == numbers[1])
    off = max(looks[0] - ours, ours - looks[1], 0)
    if off > _SLACK_NS:
        raise MeasureError(
            f"The profiler's clock is {off / 1e3:,.0f} µs off the host's, allowed are {_SLACK_NS / 1e3:.0f}: waits cannot be laid beside kernels."
        )


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
