"""The instruments against work of known size, on a real GPU. Skipped, saying so, where there is none."""

from __future__ import annotations

import pytest
import torch

from hpc_core.measure.busy import device_activity
from hpc_core.measure.clock import synchronize
from hpc_core.measure.history import AllocatorHistory
from hpc_core.measure.phases import PhasePeaks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU to measure")]
_MIB = 2**20
_PRODUCTS = 40


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", 0)


def test_busy_time_agrees_with_events_on_queued_work(device: torch.device) -> None:
    """Busy time of products queued behind a sleep is within 1 % of what CUDA events around them say, and every kernel counts."""
    left = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    out = torch.empty_like(left)
    torch.mm(left, left, out=out)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def work() -> None:
        start.record()
        torch.cuda._sleep(50_000_000)  # some 25 ms, in which everything below is queued
        for _ in range(_PRODUCTS):
            torch.mm(left, left, out=out)
        end.record()

    activity = device_activity(work, device)
    end.synchronize()

    assert activity.busy_s == pytest.approx(start.elapsed_time(end) / 1000, rel=0.01)
    assert activity.kernels == _PRODUCTS + 1


def test_copies_are_told_from_kernels(device: torch.device) -> None:
    """A memset and a copy of known size are counted as one of each, and nothing else is."""
    source = torch.ones(64 * _MIB, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def work() -> None:
        target.zero_()
        target.copy_(source)

    activity = device_activity(work, device)

    assert (activity.kernels + activity.memsets, activity.copies) == (1, 1)


def test_known_bytes_are_seen_to_the_byte(device: torch.device) -> None:
    """Allocations on a schedule give the peaks of their phases, and the history names their owners, to the byte."""
    synchronize(device)
    resting = torch.cuda.memory_allocated(device)
    kept = torch.empty(32 * _MIB, dtype=torch.uint8, device=device)
    peaks = PhasePeaks(device)
    peaks.close()
    history = AllocatorHistory(device, ("first", "second"))
    history.start()
    history.own_before("weights", [kept])

    for mark in (peaks, history):
        mark("first")
    temporary = torch.empty(64 * _MIB, dtype=torch.uint8, device=device)
    activation = torch.empty(16 * _MIB, dtype=torch.uint8, device=device)
    del temporary
    for mark in (peaks, history):
        mark("second")
    gradient = torch.empty(8 * _MIB, dtype=torch.uint8, device=device)
    history.own_now("gradients", [gradient])
    peaks.close()
    timeline = history.stop()
    at_peak = timeline.at_peak()

    assert {name: value - resting for name, value in peaks.peaks.items()} == {"first": 112 * _MIB, "second": 56 * _MIB}
    assert (at_peak["weights"], at_peak["activations"], at_peak["temporaries"]) == (32 * _MIB, 16 * _MIB, 64 * _MIB)
    assert activation.numel() + gradient.numel() == 24 * _MIB
