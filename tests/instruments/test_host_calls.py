"""CUDA calls of the host, from made-up records: order, duplicates, sentinels, and equal steps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_core.instruments.kernels import MARK, MARKS, HostCall, kinds, made_between, steps_alike

LAUNCH, WAIT = "cudaLaunchKernel", "cudaStreamSynchronize"
SENTINEL = [LAUNCH, "cudaDeviceSynchronize"]


def calls(names: list[str]) -> list[HostCall]:
    """These calls, in order."""
    return [HostCall(name, number, 10 * number) for number, name in enumerate(names)]


def between(names: list[str]) -> list[str]:
    """The kinds that `made_between` keeps of work with these calls."""
    return made_between(kinds(calls([*SENTINEL, *names, *SENTINEL])))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("cudaLaunchKernel", "launch"),
        ("cudaGraphLaunch", "graph"),
        ("cudaLaunchKernelExC", "launch"),
        ("cuLaunchKernelEx", "launch"),
        ("cudaLaunchCooperativeKernel", "launch"),
        ("cudaDeviceSynchronize", "wait"),
        ("cudaStreamSynchronize_ptsz", "wait"),
        ("cudaEventSynchronize", "wait"),
        ("cuCtxSynchronize", "wait"),
        ("cudaMemcpyAsync", "copy"),
        ("cudaMemsetAsync", "fill"),
        ("cudaMalloc", "allocation"),
        ("cuMemAlloc_v2", "allocation"),
        ("cuMemCreate", "allocation"),
        ("cudaFree", "free"),
        ("cuMemFree_v2", "free"),
        ("cuMemRelease", "free"),
        ("cudaStreamQuery", "mark"),
    ],
)
def test_calls_by_name(name: str, kind: str) -> None:
    """Runtime and driver calls are grouped by what they cost the host."""
    assert kinds(calls([name])) == [kind]


@pytest.mark.parametrize(
    "name",
    ["cudaStreamIsCapturing", "cudaEventRecord", "cudaMemGetInfo", "cudaStreamWaitEvent", "cudaFuncGetAttributes"],
)
def test_calls_that_are_no_work_are_not_counted(name: str) -> None:
    """Queries, event records and waits between streams have no kind."""
    assert kinds(calls([name])) == []


def test_a_call_and_the_driver_call_beneath_it_count_once() -> None:
    """A runtime call and its driver call count once; order follows time, not the order of records."""
    records = [HostCall("cuLaunchKernel", 7, 21), HostCall("cudaLaunchKernel", 7, 20), HostCall(WAIT, 8, 5)]
    assert kinds(records) == ["wait", "launch"]


@given(st.lists(st.sampled_from([LAUNCH, WAIT, "cudaMemcpyAsync", "cudaMalloc"]), max_size=12))
def test_only_the_waits_of_the_work_count(names: list[str]) -> None:
    """The sentinels' own waits are not counted."""
    assert between(names).count("wait") == names.count(WAIT)
    assert between(names).count("launch") == names.count(LAUNCH)


STEP = [LAUNCH, LAUNCH, WAIT, "cudaMemcpyAsync"]
END = [MARK] * MARKS


@pytest.mark.parametrize(
    ("names", "alike"),
    [
        ([*STEP, *END] * 3, True),
        ([*STEP, *END] * 2, False),  # a step is missing
        ([*STEP, *END] * 2 + STEP, False),  # a step's end is missing
        ([*STEP, *END] * 3 + [LAUNCH], False),  # something follows the last end
        ([*STEP, *END, *STEP, LAUNCH, *END, *STEP, *END], False),  # one step launches one kernel more
        ([*STEP, *END, *STEP[1:], WAIT, *END, *STEP, *END], False),  # as many calls, but other ones
        ([*STEP, MARK, *END] * 3, True),  # the case itself makes the marking call right before the end
        ([MARK, *STEP, MARK, LAUNCH, *END] * 3, True),  # the case makes marking calls one at a time
        ([*END] * 3, True),  # steps without CUDA calls
    ],
)
def test_steps_are_alike_only_if_all_were_recorded(names: list[str], alike: bool) -> None:
    """Three marked steps are alike if all three were recorded with the same calls."""
    assert steps_alike(between(names), 3) is alike


def test_a_capture_launches_nothing() -> None:
    """Calls between the begin and the end of a capture of a CUDA graph do not run on the device; its launch does."""
    names = [
        "cudaLaunchKernel",
        "cudaStreamBeginCapture",
        "cudaLaunchKernel",
        "cudaMemcpyAsync",
        "cudaStreamEndCapture",
        "cudaGraphLaunch",
    ]
    assert kinds(calls(names)) == ["launch", "graph"]
