"""The table of GPUs: what predictions, bounds and reports know about each model.

To add a GPU, add one entry here. Rates are dense, without sparsity, and accumulate in float32 where consumer cards differ
(GeForce halves them there).

Sources: NVIDIA H100 Tensor Core GPU data sheet and "NVIDIA H100 Tensor Core GPU Architecture" (H100 SXM and PCIe);
NVIDIA H200 data sheet; NVIDIA A100 80GB data sheet and "NVIDIA A100 Tensor Core GPU Architecture"; "NVIDIA Ada GPU
Architecture", appendix A (RTX 4090); "NVIDIA RTX Blackwell GPU Architecture", appendix A (RTX 5090).
"""

from __future__ import annotations

import re

import msgspec

from hpc_core.case.errors import PredictError
from hpc_core.record.record import Machine

_GIB = 2**30
_MIB = 2**20
_VENDOR = ("NVIDIA ", "GeForce ")


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """One model of GPU."""

    name: str
    """As NVML reports it, without "NVIDIA" and "GeForce"."""
    aliases: tuple[str, ...] = ()
    """Short names that mean this model although others contain them."""
    capability: tuple[int, int]
    """CUDA compute capability. bitsandbytes' `_gemm_4bit_use_custom_cuda` and torch's `sdp_utils.cpp` decide by it."""
    multiprocessors: int
    """Streaming multiprocessors. bitsandbytes' `_gemm_4bit_use_custom_cuda` compares block counts with it."""
    memory_bytes: int
    """Total memory as NVML and torch report it where we measured it (H100, H200), else the nominal size."""
    flop_per_s: dict[str, float]
    """Peak rate by compute dtype: "bfloat16", "float16", "tfloat32", "float32", "int8" (operations per second)."""
    bytes_per_s: float
    """Peak memory bandwidth."""
    l2_bytes: int
    """What can stay on the chip from one step to the next, and need not be read again."""
    source: str
    """Where the rates are from."""

    def __hash__(self) -> int:
        """By name, which is unique: rules that depend on a GPU are cached, and the rates above are a dictionary."""
        return hash(self.name)

    @property
    def workspace_bytes(self) -> int:
        """Workspace of one cuBLAS handle on one stream.

        `getChosenWorkspaceSize` in ATen/cuda/CublasHandlePool.cpp: 32 MiB (4096 KiB x 8) on Hopper and newer, and
        4096 KiB x 2 + 16 KiB x 8 elsewhere.
        """
        return 32 * _MIB if self.capability[0] >= 9 else 2 * 4 * _MIB + 8 * 16 * 1024

    @property
    def lt_workspace_bytes(self) -> int:
        """Workspace of cuBLASLt, which runs products that add a bias or a matrix.

        `getCUDABlasLtWorkspaceSize` in ATen/cuda/CublasHandlePool.cpp: 1024 KiB, confirmed on an H100 with torch 2.11. torch 2.13
        shares the cuBLAS workspace by default (`TORCH_CUBLASLT_UNIFIED_WORKSPACE`).
        """
        return _MIB

    @property
    def prefers_cudnn_attention(self) -> bool:
        """Whether attention tries cuDNN's kernels first, and not flash attention.

        `priority_order` and `check_prefer_cudnn_attention` in ATen/native/transformers/cuda/sdp_utils.cpp: Hopper and the data
        centre cards of Blackwell (compute capability 9.0 and 10.0) do.
        """
        return self.capability in ((9, 0), (10, 0))


def _rates(half: float, tf32: float, fp32: float, int8: float) -> dict[str, float]:
    tera = {"bfloat16": half, "float16": half, "tfloat32": tf32, "float32": fp32, "int8": int8}
    return {name: rate * 1e12 for name, rate in tera.items()}


DEFAULT = "H100 80GB HBM3"
"""The GPU that predictions are for unless a user names another."""

GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            name=DEFAULT,
            aliases=("h100", "h100 sxm", "h100 80gb"),
            capability=(9, 0),
            multiprocessors=132,
            memory_bytes=85_520_809_984,
            flop_per_s=_rates(989.4, 494.7, 66.9, 1978.9),
            bytes_per_s=3.35e12,
            l2_bytes=50 * _MIB,
            source="NVIDIA's H100 data sheet (SXM)",
        ),
        Gpu(
            name="H100 PCIe",
            capability=(9, 0),
            multiprocessors=114,
            memory_bytes=80 * _GIB,
            flop_per_s=_rates(756.5, 378.0, 51.2, 1513.0),
            bytes_per_s=2.039e12,
            l2_bytes=50 * _MIB,
            source="NVIDIA's H100 data sheet (PCIe)",
        ),
        Gpu(
            name="H200",
            aliases=("h200 sxm", "h200 141gb"),
            capability=(9, 0),
            multiprocessors=132,
            memory_bytes=150_754_820_096,
            flop_per_s=_rates(989.4, 494.7, 66.9, 1978.9),
            bytes_per_s=4.8e12,
            l2_bytes=50 * _MIB,
            source="NVIDIA's H200 data sheet (SXM)",
        ),
        Gpu(
            name="A100-SXM4-80GB",
            capability=(8, 0),
            multiprocessors=108,
            memory_bytes=80 * _GIB,
            flop_per_s=_rates(312.0, 156.0, 19.5, 624.0),
            bytes_per_s=2.039e12,
            l2_bytes=40 * _MIB,
            source="NVIDIA's A100 80GB data sheet (SXM)",
        ),
        Gpu(
            name="RTX 4090",
            capability=(8, 9),
            multiprocessors=128,
            memory_bytes=24 * _GIB,
            flop_per_s=_rates(165.2, 82.6, 82.6, 660.6),
            bytes_per_s=1.008e12,
            l2_bytes=72 * _MIB,
            source="NVIDIA's Ada architecture paper (RTX 4090)",
        ),
        Gpu(
            name="RTX 5090",
            capability=(12, 0),
            multiprocessors=170,
            memory_bytes=32 * _GIB,
            flop_per_s=_rates(209.5, 104.8, 104.8, 838.0),
            bytes_per_s=1.792e12,
            l2_bytes=96 * _MIB,
            source="NVIDIA's RTX Blackwell architecture paper (RTX 5090)",
        ),
    )
}


def gpu_named(name: str) -> Gpu:
    """Return the GPU that a name means: "H100", "a100 80gb", "NVIDIA GeForce RTX 4090", "rtx5090".

    Raises:
        PredictError: no GPU, or several, match. The message lists them.
    """
    wanted = _letters(name)
    exact = [gpu for gpu in GPUS.values() if wanted in {_letters(each) for each in (gpu.name, *gpu.aliases)}]
    words = _words(name)
    found = exact or [
        gpu
        for gpu in GPUS.values()
        if wanted and set(words) <= {word for each in (gpu.name, *gpu.aliases) for word in _words(each)}
    ]
    if len(found) == 1:
        return found[0]
    problem = f"{name!r} matches {' and '.join(gpu.name for gpu in found)}" if found else f"No GPU is called {name!r}"
    raise PredictError(f"{problem}. Known GPUs: {', '.join(GPUS)}.")


def gpu_of(machine: Machine) -> Gpu | None:
    """Return the machine's GPU, or None for CPUs and models that are not in the table.

    The whole name must match: an "RTX 5090 Laptop GPU" or a "GH200" is another model.
    """
    if machine.key == "cpu":
        return None
    name = machine.name
    for word in _VENDOR:
        name = name.removeprefix(word)
    return GPUS.get(name)


def _words(name: str) -> list[str]:
    """Return the words of a name without the vendor's: a whole word must match, since an A10 is no A100."""
    return [word for word in re.findall(r"[a-z0-9]+", name.lower()) if word not in ("nvidia", "geforce")]


def _letters(name: str) -> str:
    return re.sub(r"nvidia|geforce|[^a-z0-9]", "", name.lower())
