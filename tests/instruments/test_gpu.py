"""Owners of memory and modules of kernels on a real GPU; `bench/test_instruments.py` tests the other instruments there."""

from __future__ import annotations

import threading

import pytest
import torch

from hpc_core.instruments.allocations import AllocatorHistory
from hpc_core.instruments.attribution import kernel_uses
from hpc_core.instruments.clock import synchronize
from hpc_core.instruments.memory import PhasePeaks
from hpc_core.instruments.places import following
from hpc_core.instruments.trace import named_ranges

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU to measure")]
_MIB = 2**20


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", 0)


def test_owners_are_named_to_the_byte(device: torch.device) -> None:
    """A schedule of allocations gives the exact peaks of its phases and the exact bytes of each owner."""
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    weights = torch.empty(32 * _MIB, dtype=torch.uint8, device=device)
    peaks = PhasePeaks(device)
    peaks.close()
    history = AllocatorHistory(device, ("first", "second"))
    history.start()
    history.own_before("weights", [weights])

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

    assert {name: value - before for name, value in peaks.peaks.items()} == {"first": 112 * _MIB, "second": 56 * _MIB}
    assert (at_peak["weights"], at_peak["activations"], at_peak["temporaries"]) == (32 * _MIB, 16 * _MIB, 64 * _MIB)
    assert activation.numel() + gradient.numel() == 24 * _MIB


def test_kernels_are_attributed_to_their_modules(device: torch.device) -> None:
    """Every kernel of a forward and backward is attributed to its operator and module."""
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.SiLU(), torch.nn.Linear(256, 256)).to(device)
    batch = torch.ones(64, 256, device=device)

    def step() -> None:
        model(batch).sum().backward()

    step()
    with following() as places:
        uses = kernel_uses(step, device, places.here)

    launches = {use.module: 0 for use in uses}
    for use in uses:
        launches[use.module] += use.launches
    assert all(use.seconds > 0 and use.operator for use in uses)
    # A Sequential's layers share the path "*": products and activation, forward and backward.
    assert launches["*"] >= 5 + 2
    assert {"aten.silu.default", "aten.silu_backward.default"} <= {use.operator for use in uses if use.module == "*"}


def test_an_nvtx_range_holds_the_backward(device: torch.device) -> None:
    """With NVTX ranges the backward runs in the thread that opened them; without, in one of autograd's."""
    threads: dict[bool, int] = {}
    for nvtx in (True, False):
        x = torch.ones(4, device=device, requires_grad=True)
        y = x * 2
        y.register_hook(lambda _, nvtx=nvtx: threads.__setitem__(nvtx, threading.get_ident()))
        with named_ranges(nvtx=nvtx) as ranges:
            ranges("backward")
            y.sum().backward()
    assert threads[True] == threading.get_ident() != threads[False]
