"""What the host asked of CUDA, from made-up calls: order, doubles, the sentinels' own, and steps that are alike."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_core.instruments.kernels import MARK, MARKS, HostCall, kinds, made_between, steps_alike, synchronizations

LAUNCH, WAIT = "cudaLaunchKernel", "cudaStreamSynchronize"
SENTINEL = [LAUNCH, "cudaDeviceSynchronize"]


def calls(names: list[str]) -> list[HostCall]:
    """These calls, one after the other, each its own."""
    return [HostCall(name, number, 10 * number) for number, name in enumerate(names)]


def between(names: list[str]) -> list[str]:
    """What `made_between` makes of work that did these calls."""
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
        ("cudaStreamQuery", "mark"),
    ],
)
def test_calls_by_name(name: str, kind: str) -> None:
    """Runtime and driver calls fall into what they cost the host."""
    assert kinds(calls([name])) == [kind]


@pytest.mark.parametrize(
    "name", ["cudaStreamIsCapturing", "cudaEventRecord", "cudaMalloc", "cudaStreamWaitEvent", "cudaFuncGetAttributes"]
)
def test_what_is_no_work_is_not_counted(name: str) -> None:
    """Questions, records of events and waits of one stream for another are no kind."""
    assert kinds(calls([name])) == []


def test_a_call_and_the_driver_call_beneath_it_count_once() -> None:
    """Two records of one number and kind are one launch; the host's order does not hang on that of the records."""
    twice = [HostCall("cuLaunchKernel", 7, 21), HostCall("cudaLaunchKernel", 7, 20), HostCall(WAIT, 8, 5)]
    assert kinds(twice) == ["wait", "launch"]


@given(st.lists(st.sampled_from([LAUNCH, WAIT, "cudaMemcpyAsync", "cudaMalloc"]), max_size=12))
def test_only_the_waits_of_the_work_count(names: list[str]) -> None:
    """Neither our wait for the first sentinel nor that for the last one is a synchronization of the case."""
    assert synchronizations(between(names)) == names.count(WAIT)
    assert between(names).count("launch") == names.count(LAUNCH)


STEP = [LAUNCH, LAUNCH, WAIT, "cudaMemcpyAsync"]
END = [MARK] * MARKS


@pytest.mark.parametrize(
    ("names", "alike"),
    [
        ([*STEP, *END] * 3, True),
        ([*STEP, *END] * 2, False),  # a step is missing
        ([*STEP, *END] * 2 + STEP, False),  # its end is missing
        ([*STEP, *END] * 3 + [LAUNCH], False),  # something follows the last end
        ([*STEP, *END, *STEP, LAUNCH, *END, *STEP, *END], False),  # a kernel that every second step launches
        ([*STEP, *END, *STEP[1:], WAIT, *END, *STEP, *END], False),  # as many calls, but others
        ([*STEP, MARK, *END] * 3, True),  # a question of the case itself, right before the end
        ([MARK, *STEP, MARK, LAUNCH, *END] * 3, True),  # the case's own questions, one at a time
        ([*END] * 3, True),  # steps that ask nothing of CUDA
    ],
)
def test_steps_are_alike_only_where_each_was_seen(names: list[str], alike: bool) -> None:
    """Three marked steps are alike if all three were seen and each did the same, in whatever order."""
    assert steps_alike(between(names), 3) is alike
