"""Idle time of made-up device records, and the offset between two clocks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_core.case.errors import MeasureError
from hpc_core.instruments.gaps import idle_within, offset_ns
from hpc_core.instruments.kernels import HostCall, Interval

spans = st.tuples(st.integers(0, 400), st.integers(1, 60)).map(lambda pair: (pair[0], sum(pair)))


def _kernels(kernels: list[tuple[int, int]]) -> list[Interval]:
    return [Interval("gemm", "kernel", 7, start, stop) for start, stop in kernels]


@given(st.lists(spans, min_size=1, max_size=12), st.lists(spans, max_size=8), st.integers(0, 200))
def test_idle_time_is_what_counting_nanoseconds_gives(
    kernels: list[tuple[int, int]], windows: list[tuple[int, int]], since: int
) -> None:
    """From `since` to the last record each nanosecond is busy or idle, and within a window or not."""
    busy = {moment for start, stop in kernels for moment in range(start, stop) if moment >= since}
    if not busy:
        with pytest.raises(MeasureError, match="nothing ran"):
            idle_within(_kernels(kernels), windows, since_ns=since)
        return
    result = idle_within(_kernels(kernels), windows, since_ns=since)
    idle = set(range(min(busy), max(busy) + 1)) - busy
    within = idle & {moment for start, stop in windows for moment in range(start, stop)}
    nanoseconds = [round(value * 1e9) for value in (result.span_s, result.busy_s, result.idle_s, result.within_s)]
    assert nanoseconds == [len(busy) + len(idle), len(busy), len(idle), len(within)]


@pytest.mark.parametrize(("stream", "apart"), [(7, False), (9, True)])
def test_copies_to_the_device_may_have_their_own_stream(stream: int, apart: bool) -> None:
    """Copies from the host are apart if no kernel uses their stream; without any there is no answer."""
    work = [*_kernels([(0, 10)]), Interval("Memcpy DtoD (Device -> Device)", "copy", 7, 10, 11)]
    copy = Interval("Memcpy HtoD (Pinned -> Device)", "copy", stream, 3, 5)
    assert idle_within([*work, copy], []).copies_apart is apart
    assert idle_within(work, []).copies_apart is None


def test_the_offset_of_two_clocks_comes_from_a_launch() -> None:
    """A marked launch gives the offset; one that took too long or was not recorded is an error."""
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
