"""Measure how fast this machine is, once per session: its ceilings, and the canary.

Numbers are shown as a share of these ceilings, not only of a data sheet: GPUs, clocks and power limits differ. The canary is
work that the code under test cannot change, so a change of the canary is a change of the machine. One part of it is bound by
compute, the other by memory.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from hpc_core.case.errors import MeasureError
from hpc_core.instruments.clock import quiet, seconds_of, synchronize
from hpc_core.instruments.kernels import device_activity
from hpc_core.record.findings import Findings

_SIZE = 8192
"""Edge of the matrix product: 1.1 TFLOP, far longer than a launch, and 400 MB of operands."""
_COPY_BYTES = 2**32
_ROUNDS = 15


def measure_machine(device: torch.device, *, canary: bool) -> tuple[dict[str, float], dict[str, float], Findings]:
    """Return the ceilings, the canary if requested, and a note if the canary could not be measured."""
    ceilings = measure_ceilings(device)
    if not canary:
        return ceilings, {}, Findings()
    try:
        return ceilings, measure_canary(device), Findings()
    except MeasureError as error:
        return ceilings, {}, Findings(notes=(f"no canary: {error}",))


def measure_ceilings(device: torch.device) -> dict[str, float]:
    """Measure `matmul_bfloat16_flop_per_s`, `matmul_float16_flop_per_s`, `matmul_float32_flop_per_s` and `copy_bytes_per_s`.

    Each is the median of 15 rounds on random data (zeros run faster), timed by CUDA events after 3 rounds of warm-up. The copy
    counts bytes read and bytes written. Returns nothing on a CPU, where no gated metric needs a ceiling.
    """
    if device.type != "cuda":
        return {}
    found = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        # By torch's default, float32 products do not use tensor cores and take 20 times as long.
        edge = _SIZE if dtype != torch.float32 else _SIZE // 2
        left = torch.randn(edge, edge, device=device, dtype=torch.float32).to(dtype)
        right = torch.randn(edge, edge, device=device, dtype=torch.float32).to(dtype)
        out = torch.empty_like(left)
        name = str(dtype).removeprefix("torch.")
        found[f"matmul_{name}_flop_per_s"] = (
            2 * edge**3 / _median_s(lambda a=left, b=right, c=out: torch.mm(a, b, out=c))
        )
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found["copy_bytes_per_s"] = 2 * _COPY_BYTES / _median_s(lambda: target.copy_(source))
    return found


def _median_s(work: object) -> float:
    assert callable(work)
    for _ in range(3):
        work()
    pairs = []
    for _ in range(_ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    milliseconds: list[float] = [start.elapsed_time(end) for start, end in pairs]
    return statistics.median(milliseconds) / 1000


_CANARY_EDGE = 8192
_CANARY_BYTES = 2**31
_TIMES = 20
"""About 35 ms of products and 30 ms of copies on an H100: far longer than a launch, far shorter than a case."""
_WARM_UPS = 3
_CANARY_EDGE_CPU = 512
_CANARY_BYTES_CPU = 2**26
_ROUNDS_CPU = 5


def measure_canary(device: torch.device) -> dict[str, float]:
    """Measure the seconds of a fixed matrix product, `compute`, and of a fixed large copy, `memory`.

    On a GPU: busy seconds, the mean of 20 (bfloat16, 8192 cubed; 2 GiB read and written). On a CPU: wall seconds, the median of 5
    (float32, 512 cubed; 64 MiB). They are noisy there, so they only lead to a note.

    Raises:
        MeasureError: the profiler's reading was incomplete three times in a row.
    """
    on_gpu = device.type == "cuda"
    edge, count = (_CANARY_EDGE, _CANARY_BYTES) if on_gpu else (_CANARY_EDGE_CPU, _CANARY_BYTES_CPU)
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
