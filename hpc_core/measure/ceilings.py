"""How fast this machine is, measured once a session: a large matrix product and a large copy.

A number stands beside these ceilings, never beside a data sheet alone: cards, clocks and power limits differ.
"""

from __future__ import annotations

import statistics

import torch

__all__ = ["DATASHEETS", "measure_ceilings"]

_SIZE = 8192
"""Edge of the matrix product: 1.1 TFLOP, long against a launch, 400 MB of operands."""
_COPY_BYTES = 2**32
_ROUNDS = 15

DATASHEETS: dict[str, dict[str, float]] = {
    # NVIDIA's data sheets, dense rates without sparsity; bytes a second of device memory.
    "H100 80GB HBM3": {"bfloat16": 989.4e12, "float16": 989.4e12, "copy": 3.35e12},
    "H200": {"bfloat16": 989.4e12, "float16": 989.4e12, "copy": 4.8e12},
    "A100-SXM4-80GB": {"bfloat16": 312e12, "float16": 312e12, "copy": 2.039e12},
    "RTX 4090": {"bfloat16": 165.2e12, "float16": 165.2e12, "copy": 1.008e12},
    "RTX 5090": {"bfloat16": 209.5e12, "float16": 209.5e12, "copy": 1.792e12},
}
"""Peak rates by a part of the GPU's name, to refuse what no card can do; float32 accumulation."""


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
