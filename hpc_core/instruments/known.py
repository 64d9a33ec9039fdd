"""Work of known size, to test the instruments: a sleeping device, scheduled allocations, launches and matrix products.

Each function is a factory for `perf("hpc_core.instruments.known:sleeping", seconds=0.02)`, as users write them, so a test covers
everything from a step to a record.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from hpc_core.instruments.program import Mark, unmarked

_MIB = 2**20
_CALIBRATION_CYCLES = 50_000_000
"""About 25 ms at 2 GHz."""


class _OnePhase:
    phases: tuple[str, ...] = ("step",)
    period = 1


class _Sleeping(_OnePhase):
    def __init__(self, seconds: float, times: int, streams: int, pause_s: float):
        self._cycles = round(_cycles_per_s() * seconds)
        self._times, self._pause_s = times, pause_s
        self._streams = [torch.cuda.Stream() for _ in range(streams)]
        self._kept = torch.empty(2 * _MIB, dtype=torch.uint8, device="cuda")  # a peak of zero would prove nothing

    def step(self, mark: Mark = unmarked) -> None:
        mark("step")
        here = torch.cuda.current_stream()
        for index in range(self._times):
            if index and self._pause_s:
                here.synchronize()
                time.sleep(self._pause_s)
            for stream in self._streams:
                stream.wait_stream(here)
                with torch.cuda.stream(stream):
                    torch.cuda._sleep(self._cycles)
            for stream in self._streams:
                here.wait_stream(stream)


def sleeping(seconds: float, times: int = 1, streams: int = 1, pause_s: float = 0.0) -> Any:
    """Let the GPU sleep `times` times for `seconds` on several streams at once, idle for `pause_s` in between.

    Busy time is `times * seconds`, whatever the streams and pauses. A sleep takes cycles, so the clock rate is measured first.
    """
    return _Sleeping(seconds, times, streams, pause_s)


def _cycles_per_s() -> float:
    torch.cuda._sleep(4 * _CALIBRATION_CYCLES)  # until the clock rate is stable
    rates: list[float] = []
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        torch.cuda._sleep(_CALIBRATION_CYCLES)
        end.record()
        end.synchronize()
        rates.append(_CALIBRATION_CYCLES / (start.elapsed_time(end) / 1000))
    return statistics.median(rates)


class _Scheduled:
    phases: tuple[str, ...] = ("first", "second")
    period = 1

    def __init__(self, unit_bytes: int, device: str):
        self._unit, self._device = unit_bytes, device
        self._kept = self._bytes(2)

    def _bytes(self, units: int) -> torch.Tensor:
        return torch.empty(units * self._unit, dtype=torch.uint8, device=self._device)

    def step(self, mark: Mark = unmarked) -> None:
        mark("first")
        temporary, activation = self._bytes(4), self._bytes(1)
        self._kept.zero_()  # on a CPU, memory counts only if the step uses it
        del temporary
        mark("second")
        another = self._bytes(2)
        del activation, another


def scheduled(unit_bytes: int, device: str = "cuda") -> Any:
    """Allocate in two phases: 2 units exist before the step, the first phase adds 4 and 1, and the second adds 2.

    The 4 are released at the end of the first phase, the rest at the end of the second. So the peaks are 7 and 5 units, and the
    peak consists of 2 units of "other", 4 of temporaries and 1 of activations.
    """
    return _Scheduled(unit_bytes, device)


class _Launching(_OnePhase):
    def __init__(self, kernels: int, copies: int, fills: int, device: str):
        self._kernels, self._copies, self._fills = kernels, copies, fills
        self._source = torch.zeros(2 * _MIB, dtype=torch.uint8, device=device)
        self._target = torch.zeros_like(self._source)

    def step(self, mark: Mark = unmarked) -> None:
        mark("step")
        for _ in range(self._kernels):
            self._source.add_(1)
        for _ in range(self._copies):
            self._target.copy_(self._source)
        for _ in range(self._fills):
            self._target.zero_()


def launching(kernels: int, copies: int, fills: int, device: str = "cuda") -> Any:
    """Run additions of one kernel each, copies, and fills with zero, which are a kernel or a memset."""
    return _Launching(kernels, copies, fills, device)


class _Multiplying(_OnePhase):
    def __init__(self, rows: int, inner: int, columns: int, times: int, device: str, dtype: str):
        kind = getattr(torch, dtype)
        self._left = torch.randn(rows, inner, device=device).to(kind)
        self._right = torch.randn(inner, columns, device=device).to(kind)
        self._out = torch.empty(rows, columns, device=device, dtype=kind)
        self._times = times

    def step(self, mark: Mark = unmarked) -> None:
        mark("step")
        for _ in range(self._times):
            torch.mm(self._left, self._right, out=self._out)


def multiplying(
    rows: int, inner: int, columns: int, times: int = 1, device: str = "cuda", dtype: str = "bfloat16"
) -> Any:
    """Run `times` matrix products of 2 * rows * inner * columns FLOP each."""
    return _Multiplying(rows, inner, columns, times, device, dtype)
