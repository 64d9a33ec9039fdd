"""Busy time of made-up device records, and readings that void themselves."""

from __future__ import annotations

from typing import Any

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
    """Records between the sentinels, on three streams, that may overlap, touch or be empty."""
    drawn = []
    for _ in range(draw(st.integers(0, 15))):
        name, kind = draw(st.sampled_from(["gemm", "softmax"])), draw(st.sampled_from(["kernel", "copy", "memset"]))
        start, length = draw(st.integers(11, 500)), draw(st.integers(0, 200))
        drawn.append(Interval(name, kind, draw(st.integers(0, 2)), start, start + length))
    return drawn


def _total(records: list[Interval]) -> int:
    return sum(record.end_ns - record.start_ns for record in records)


@given(intervals())
def test_the_union_is_what_counting_nanoseconds_gives(records: list[Interval]) -> None:
    """The union is the number of nanoseconds in which something ran, between the longest record and the sum."""
    covered = {moment for record in records for moment in range(record.start_ns, record.end_ns)}
    union = round(union_s(records) * 1e9)
    assert union == len(covered)
    assert max((record.end_ns - record.start_ns for record in records), default=0) <= union <= _total(records)


@given(intervals(), st.randoms(use_true_random=False), st.integers(1, 100))
def test_the_union_depends_on_no_order_and_no_cuts(records: list[Interval], random: Any, cut: int) -> None:
    """Shuffling the records, or cutting each into two that touch, changes nothing."""
    shuffled = list(records)
    random.shuffle(shuffled)
    pieces = []
    for record in records:
        middle = min(record.start_ns + cut, record.end_ns)
        pieces += [
            Interval(record.name, record.kind, record.stream, record.start_ns, middle),
            Interval(record.name, record.kind, record.stream, middle, record.end_ns),
        ]
    assert union_s(records) == union_s(shuffled) == union_s(pieces)


@given(intervals())
def test_totals_leave_out_the_sentinels(records: list[Interval]) -> None:
    """Counts and seconds, by kernel and by stream, are those of the records between the sentinels."""
    kernels = [record for record in records if record.kind == "kernel"]
    activity = summarize([END, *records, START], len(kernels) + 2)
    assert activity.busy_s == union_s(records)
    assert (activity.kernels, activity.copies + activity.memsets) == (len(kernels), len(records) - len(kernels))
    assert sum(activity.kernel_counts.values()) == len(kernels)
    assert sum(activity.kernel_s.values()) == pytest.approx(_total(kernels) / 1e9)
    assert not any("spin" in name for name in activity.kernel_s)
    assert activity.busy_s <= sum(activity.stream_s.values()) + 1e-12
    assert set(activity.stream_s) == {record.stream for record in records}


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
    """A missing sentinel, a record outside them and a launch without its kernel each void the reading."""
    with pytest.raises(MeasureError, match=message):
        summarize(records, launches)


def _replayed(graph: int, start: int) -> list[Interval]:
    return [Interval("gemm", "kernel", 7, start + at, start + at + 10, graph) for at in (0, 20)]


def test_kernels_of_a_graph_need_one_launch_together() -> None:
    """Two replays of two kernels count as four kernels, in addition to kernels that the host launched one by one."""
    records = [START, *_replayed(5, 100), *_replayed(6, 200), Interval("copy", "kernel", 7, 300, 310), END]
    activity = summarize(records, 3, 2)
    assert (activity.kernels, activity.busy_s) == (5, 50e-9)


@pytest.mark.parametrize("launched", [1, 3])
def test_a_graph_without_kernels_voids_the_reading(launched: int) -> None:
    """The profiler must record kernels of as many graphs as were launched."""
    with pytest.raises(MeasureError, match=f"launched {launched} CUDA graphs, the profiler recorded kernels of 2"):
        summarize([START, *_replayed(5, 100), *_replayed(6, 200), END], 2, launched)


def test_a_spinning_kernel_of_the_work_counts() -> None:
    """Only the first and the last record are sentinels; a spinning kernel between them is work."""
    activity = summarize([START, Interval("spin_kernel", "kernel", 7, 20, 30), END], 3)
    assert (activity.kernels, activity.busy_s) == (1, 1e-8)


def test_an_incomplete_reading_is_repeated_three_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """After three incomplete readings busy time and kernel counts are void."""
    tries: list[object] = []

    def nothing(work: object, device: object, watch: object) -> list[object]:
        tries.append(work)
        return []

    monkeypatch.setattr(kernels, "recorded", nothing)
    with pytest.raises(MeasureError, match="Tried 3 times; busy time and kernel counts of this run are void"):
        device_activity(lambda: None, torch.device("cpu"))
    assert len(tries) == 3


def test_the_second_reading_counts_when_the_first_was_incomplete(monkeypatch: pytest.MonkeyPatch) -> None:
    """A complete reading after an incomplete one counts."""
    calls = [HostCall("cudaLaunchKernel", number, number) for number in range(3)]
    readings = iter([([START], calls[:1]), ([START, Interval("gemm", "kernel", 7, 20, 50), END], calls)])
    monkeypatch.setattr(kernels, "recorded", lambda work, device, watch: [])
    monkeypatch.setattr(kernels, "sorted_events", lambda events: next(readings))
    activity = device_activity(lambda: None, torch.device("cpu"))
    assert (activity.kernels, activity.busy_s, activity.kernel_counts) == (1, 30e-9, {"gemm": 1})
