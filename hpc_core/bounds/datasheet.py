"""What the makers say that their cards can do at most: rates of matrix products, memory bandwidth, memory, cache.

Rates are dense, without sparsity, and accumulate in float32 where consumer cards differ (GeForce halves them there).
A whole step never comes near these rates, so no allowance is made for cards that clock a little above the sheet.

Sources: NVIDIA H100 Tensor Core GPU data sheet and "NVIDIA H100 Tensor Core GPU Architecture" (H100 SXM and PCIe);
NVIDIA H200 data sheet; NVIDIA A100 80GB data sheet and "NVIDIA A100 Tensor Core GPU Architecture"; "NVIDIA Ada GPU
Architecture", appendix A (RTX 4090); "NVIDIA RTX Blackwell GPU Architecture", appendix A (RTX 5090).
"""

from __future__ import annotations

import msgspec

from hpc_core.record.record import Machine

__all__ = ["DATASHEETS", "Datasheet", "datasheet"]

_GIB = 2**30
_MIB = 2**20
_MAKERS_WORDS = ("NVIDIA ", "GeForce ")


class Datasheet(msgspec.Struct, frozen=True, kw_only=True):
    """One card's peaks: FLOP/s by compute dtype (`int8`: operations/s), bytes/s, bytes."""

    name: str
    flop_per_s: dict[str, float]
    """"bfloat16", "float16", "tfloat32", "float32", "int8"."""
    bytes_per_s: float
    memory_bytes: int
    """Of the card; what NVML reports is a little less."""
    l2_bytes: int
    """What can stay on the chip from one step to the next, and so need not be read again."""
    source: str


def _rates(half: float, tf32: float, fp32: float, int8: float) -> dict[str, float]:
    tera = {"bfloat16": half, "float16": half, "tfloat32": tf32, "float32": fp32, "int8": int8}
    return {name: rate * 1e12 for name, rate in tera.items()}


DATASHEETS: dict[str, Datasheet] = {
    sheet.name: sheet
    for sheet in (
        Datasheet(
            name="H100 80GB HBM3",
            flop_per_s=_rates(989.4, 494.7, 66.9, 1978.9),
            bytes_per_s=3.35e12,
            memory_bytes=80 * _GIB,
            l2_bytes=50 * _MIB,
            source="NVIDIA's H100 data sheet (SXM)",
        ),
        Datasheet(
            name="H100 PCIe",
            flop_per_s=_rates(756.5, 378.0, 51.2, 1513.0),
            bytes_per_s=2.039e12,
            memory_bytes=80 * _GIB,
            l2_bytes=50 * _MIB,
            source="NVIDIA's H100 data sheet (PCIe)",
        ),
        Datasheet(
            name="H200",
            flop_per_s=_rates(989.4, 494.7, 66.9, 1978.9),
            bytes_per_s=4.8e12,
            memory_bytes=141 * _GIB,
            l2_bytes=50 * _MIB,
            source="NVIDIA's H200 data sheet (SXM)",
        ),
        Datasheet(
            name="A100-SXM4-80GB",
            flop_per_s=_rates(312.0, 156.0, 19.5, 624.0),
            bytes_per_s=2.039e12,
            memory_bytes=80 * _GIB,
            l2_bytes=40 * _MIB,
            source="NVIDIA's A100 80GB data sheet (SXM)",
        ),
        Datasheet(
            name="RTX 4090",
            flop_per_s=_rates(165.2, 82.6, 82.6, 660.6),
            bytes_per_s=1.008e12,
            memory_bytes=24 * _GIB,
            l2_bytes=72 * _MIB,
            source="NVIDIA's Ada architecture paper (RTX 4090)",
        ),
        Datasheet(
            name="RTX 5090",
            flop_per_s=_rates(209.5, 104.8, 104.8, 838.0),
            bytes_per_s=1.792e12,
            memory_bytes=32 * _GIB,
            l2_bytes=96 * _MIB,
            source="NVIDIA's RTX Blackwell architecture paper (RTX 5090)",
        ),
    )
}
"""By the name that the driver reports, without the maker's words."""


def datasheet(machine: Machine) -> Datasheet | None:
    """The machine's sheet; None for CPUs and cards that are not listed.

    The whole name must match: an "RTX 5090 Laptop GPU" or a "GH200" is another card.
    """
    if machine.key == "cpu":
        return None
    name = machine.name
    for word in _MAKERS_WORDS:
        name = name.removeprefix(word)
    return DATASHEETS.get(name)
