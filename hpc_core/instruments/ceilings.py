"""How fast this machine is, measured once a session: a large matrix product and a large copy.

A number stands beside these ceilings, never beside a data sheet alone: cards, clocks and power limits differ.
"""

from __future__ import annotations

import statistics

import torch

__all__ = ["measure_ceilings"]

_SIZE = 8192
"""Edge of the matrix product: 1.1 TFLOP, long against a launch, 400 MB of operands."""
_COPY_BYTES = 2**32
_ROUNDS = 15


def measure_ceilings(device: torch.device) -> dict[str, float]:
    """`matmul_bfloat16_flop_per_s`, `matmul_float16_flop_per_s`, `matmul_float32_flop_per_s` and `copy_bytes_per_s`.

    On random data (zeros run faster), median of 15 event-timed rounds after 3 of warm-up. The copy counts bytes read
    and bytes written. Empty on a CPU, where nothing is gated that a ceiling could explain.
    """
    if device.type != "cuda":
        return {}
    found = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        # float32 products run without tensor cores by torch's default and take 20 times as long.
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
