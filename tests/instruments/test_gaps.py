"""Laws of idle time on synthetic device records, and how two clocks are laid beside each other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_core.case.errors import MeasureError
from hpc_core.instruments.gaps import idle_within, offset_ns
from hpc_core.instruments.kernels import HostCall, Interval

spans = st.tuples(st.integers(0, 400), st.integers(1, 60)).map(lambda pair: (pair[0], sum(pair)))


def _kernels(found: list[tuple[int, int]]) -> list[Interval]:
    return [Interval("gemm", "kernel", 7, start, stop) for start, stop in found]


@given(st.lists(spans, min_size=1, max_size=12), st.lists(spans, max_size=8), st.integers(0, 200))
def test_idle_time_is_what_counting_nanoseconds_gives(
    ran: list[tuple[int, int]], windows: list[tuple[int, int]], since: int
) -> None:
    """From `since` to the last record each nanosecond is busy or idle, and idle within a window or not, whatever overlaps."""
    busy = {moment for start, stop in ran for moment in range(start, stop) if moment >= since}
    if not busy:
        with pytest.raises(MeasureError, match="nothing ran"):
            idle_within(_kernels(ran), windows, since_ns=since)
        return
    seen = idle_within(_kernels(ran), windows, since_ns=since)
    idle = set(range(min(busy), max(busy) + 1)) - busy
    waited = {moment for start, stop in windows for moment in range(start, stop)}
    found = [round(value * 1e9) for value in (seen.span_s, seen.busy_s, seen.idle_s, seen.within_s)]
    assert found == [len(busy) + len(idle), len(busy), len(idle), len(idle & waited)]


@pytest.mark.parametrize(("stream", "apart"), [(7, False), (9, True)])
def test_a_copy_to_the_device_is_seen_apart_or_among_the_kernels(stream: int, apart: bool) -> None:
    """By its stream; a replayed graph's own copies belong to the step; without a copy there is nothing to say."""
    work = [*_kernels([(0, 10)]), Interval("Memcpy DtoD (Device -> Device)", "copy", 7, 10, 11)]
    copy = Interval("Memcpy HtoD (Pinned -> Device)", "copy", stream, 3, 5)
    assert idle_within([*work, copy], []).copies_apart is apart
    assert idle_within(work, []).copies_apart is None


def test_clocks_are_laid_beside_each_other_by_a_launch() -> None:
    """The second launch, seen twice by the profiler, lies at the first look; looks too far apart say nothing, nor does a missing launch."""
    calls = [
        HostCall("cudaLaunchKernel", 1, 1_000),
        HostCall("cudaDeviceSynchronize", 2, 2_000),
        HostCall("cudaLaunchKernel", 3, 5_000),
        HostCall("cuLaunchKernel", 3, 5_100),
        HostCall("cudaLaunchKernel", 4, 9_000),
    ]
    assert offset_ns(calls, (105_000, 110_000)) == -100_000
    with pytest.raises(MeasureError, match="A launch took 200 µs"):
        offset_ns(calls, (0, 200_000))
    with pytest.raises(MeasureError, match="was not recorded"):
        offset_ns(calls[:2], (0, 10))
