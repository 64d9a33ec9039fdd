"""The canary: work that no change of the code under test can move, so that what moves it is the machine.

One piece is bound by computing, the other by memory; a session's drift shows in one or the other.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from hpc_core.instruments.busy import device_activity
from hpc_core.instruments.clock import quiet, seconds_of, synchronize

__all__ = ["measure_canary"]

_EDGE = 8192
_COPY_BYTES = 2**31
_TIMES = 20
"""About 35 ms of products and 30 ms of copies on an H100: long against a launch, short against a case."""
_WARM_UPS = 3
_EDGE_CPU = 512
_COPY_BYTES_CPU = 2**26
_ROUNDS_CPU = 5


def measure_canary(device: torch.device) -> dict[str, float]:
    """Seconds of a matrix product, `compute`, and of a large copy, `memory`: always the same ones, on random data.

    On a GPU busy seconds of one, a mean over 20 (bfloat16, 8192 cubed; 2 GiB read and written). On a CPU wall seconds, the median of 5
    (float32, 512 cubed; 64 MiB): what a clock sees there is noise, and nothing is made of it but a note.

    Raises:
        MeasureError: the profiler's reading was incomplete three times in a row.
    """
    on_gpu = device.type == "cuda"
    edge, count = (_EDGE, _COPY_BYTES) if on_gpu else (_EDGE_CPU, _COPY_BYTES_CPU)
    draw = torch.Generator(device=device)
    draw.manual_seed(0)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    left, right = (torch.randn(edge, edge, device=device, generator=draw).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timed = _busy_s if on_gpu else _wall_s
    return {
        "compute": timed(lambda: torch.mm(left, right, out=out), device),
        "memory": timed(lambda: target.copy_(source), device),
    }


def _busy_s(work: Callable[[], object], device: torch.device) -> float:
    def repeated(times: int) -> None:
        for _ in range(times):
            work()

    repeated(_WARM_UPS)
    synchronize(device)
    return device_activity(lambda: repeated(_TIMES), device).busy_s / _TIMES


def _wall_s(work: Callable[[], object], device: torch.device) -> float:
    def once() -> None:
        work()

    with quiet():
        for _ in range(_WARM_UPS):
            once()
        return statistics.median(seconds_of(once, device) for _ in range(_ROUNDS_CPU))
