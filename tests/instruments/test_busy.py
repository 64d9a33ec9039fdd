"""Laws of busy time on synthetic device records, and readings that void themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpc_core.case.errors import MeasureError
from hpc_core.instruments import kernels
from hpc_core.instruments.kernels import HostCall, Interval, device_activity, summarize, union_s

START = Interval("spin_kernel(long)", "kernel", 7, 0, 10)
END = Interval("spin_kernel(long)", "kernel", 7, 10_000_000, 10_000_010)


@st.composite
def intervals(draw: st.DrawFn) -> list[Interval]:
    """Records between the sentinels, on three streams, that may overlap, touch and be empty."""
    found = []
    for _ in range(draw(st.integers(0, 15))):
        start = draw(st.integers(11, 500))
        length = draw(st.integers(0, 200))
        kind = draw(st.sampled_from(["kernel", "copy", "memset"]))
        found.append(
            Interval(draw(st.sampled_from(["gemm", "softmax"])), kind, draw(st.integers(0, 2)), start, start + length)
        )
    return found


def _total(found: list[Interval]) -> int:
    return sum(interval.end_ns - interval.start_ns for interval in found)


@given(intervals())
def test_the_union_is_what_counting_nanoseconds_gives(found: list[Interval]) -> None:
    """The union equals the number of nanoseconds in which something ran, and lies between the longest and the sum."""
    covered = {moment for interval in found for moment in range(interval.start_ns, interval.end_ns)}
    union = round(union_s(found) * 1e9)
    assert union == len(covered)
    assert max((interval.end_ns - interval.start_ns for interval in found), default=0) <= union <= _total(found)


@given(intervals(), st.randoms(use_true_random=False), st.integers(1, 100))
def test_the_union_knows_no_order_and_no_cuts(found: list[Interval], random: object, cut: int) -> None:
    """Shuffling the records, or cutting each in two that touch, changes nothing."""
    shuffled = list(found)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    pieces = []
    for one in found:
        middle = min(one.start_ns + cut, one.end_ns)
        pieces += [
            Interval(one.name, one.kind, one.stream, one.start_ns, middle),
            Interval(one.name, one.kind, one.stream, middle, one.end_ns),
        ]
    assert union_s(found) == union_s(shuffled) == union_s(pieces)


@given(intervals())
def test_totals_leave_out_the_sentinels(found: list[Interval]) -> None:
    """Counts, seconds by kernel and by stream are those of the records between the sentinels."""
    kernels = [interval for interval in found if interval.kind == "kernel"]
    seen = summarize([END, *found, START], len(kernels) + 2)
    assert seen.busy_s == union_s(found)
    assert (seen.kernels, seen.copies + seen.memsets) == (len(kernels), len(found) - len(kernels))
    assert sum(seen.kernel_counts.values()) == len(kernels)
    assert sum(seen.kernel_s.values()) == pytest.approx(_total(kernels) / 1e9)
    assert not any("spin" in name for name in seen.kernel_s)
    assert seen.busy_s <= sum(seen.stream_s.values()) + 1e-12
    assert set(seen.stream_s) == {interval.stream for interval in found}


@pytest.mark.parametrize(
    ("records", "launches", "message"),
    [
        ([], 0, "Of 0 device records 0 of 2 ends are sentinel"),
        ([START], 1, "Of 1 device records 1 of 2 ends are sentinel"),
        ([START, Interval("gemm", "kernel", 7, 20, 30)], 2, "1 of 2 ends"),
        ([START, END, Interval("late", "kernel", 7, 20_000_000, 20_000_001)], 3, "1 of 2 ends"),
        (
            [START, Interval("gemm", "kernel", 7, 20, 30), END],
            4,
            "The host launched 4 kernels, the profiler recorded 3",
        ),
        (
            [START, Interval("gemm", "kernel", 7, 20, 30), END],
            2,
            "The host launched 2 kernels, the profiler recorded 3",
        ),
    ],
)
def test_an_incomplete_reading_is_void(records: list[Interval], launches: int, message: str) -> None:
    """A missing sentinel, a record outside them and a launch without its kernel each void the reading, with numbers."""
    with pytest.raises(MeasureError, match=message):
        summarize(records, launches)


def _replayed(graph: int, start: int) -> list[Interval]:
    return [Interval("gemm", "kernel", 7, start + at, start + at + 10, graph) for at in (0, 20)]


def test_kernels_of_a_graph_need_no_launch_of_their_own() -> None:
    """Two replays of two kernels are four kernels by two launches of a graph, beside what the host launched kernel by kernel."""
    records = [START, *_replayed(5, 100), *_replayed(6, 200), Interval("copy", "kernel", 7, 300, 310), END]
    seen = summarize(records, 3, 2)
    assert (seen.kernels, seen.busy_s) == (5, 50e-9)


@pytest.mark.parametrize(("graphs", "seen"), [(1, 2), (3, 2)])
def test_a_graph_that_left_no_kernel_voids_the_reading(graphs: int, seen: int) -> None:
    """As many graphs must have left kernels as were launched."""
    with pytest.raises(MeasureError, match=f"launched {graphs} CUDA graphs, the profiler recorded kernels of {seen}"):
        summarize([START, *_replayed(5, 100), *_replayed(6, 200), END], 2, graphs)


def test_a_sleep_of_the_work_itself_is_work() -> None:
    """Only the first and the last record are ours: a spinning kernel between them belongs to who is measured."""
    seen = summarize([START, Interval("spin_kernel", "kernel", 7, 20, 30), END], 3)

    assert (seen.kernels, seen.busy_s) == (1, 1e-8)


def test_a_reading_that_stays_incomplete_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The profiler is tried three times, then the numbers are void."""
    tries: list[object] = []

    def nothing(work: object, device: object) -> list[object]:
        tries.append(work)
        return []

    monkeypatch.setattr(kernels, "recorded", nothing)
    with pytest.raises(MeasureError, match="Tried 3 times; busy time and kernel counts of this run are void"):
        device_activity(lambda: None, torch.device("cpu"))
    assert len(tries) == 3


def test_the_second_reading_counts_when_the_first_was_incomplete(monkeypatch: pytest.MonkeyPatch) -> None:
    """A complete reading after an incomplete one is the one that is told."""
    calls = [HostCall("cudaLaunchKernel", number, number) for number in range(3)]
    readings = iter([([START], calls[:1]), ([START, Interval("gemm", "kernel", 7, 20, 50), END], calls)])
    monkeypatch.setattr(kernels, "recorded", lambda work, device: [])
    monkeypatch.setattr(kernels, "sorted_events", lambda events: next(readings))
    seen = device_activity(lambda: None, torch.device("cpu"))
    assert (seen.kernels, seen.busy_s, seen.kernel_counts) == (1, 30e-9, {"gemm": 1})
