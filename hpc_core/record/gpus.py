"""What torch and its libraries ask of a GPU before they choose how to compute: the kinds of GPU that can be predicted for.

Facts only, each with the place in torch's or bitsandbytes' own code that asks for it. Rates and bandwidths are in
`hpc_core.bounds.datasheet`.
"""

from __future__ import annotations

import msgspec

from hpc_core.case.errors import PredictError

__all__ = ["DEFAULT", "GPUS", "Gpu", "gpu_named"]

_GIB = 2**30
_MIB = 2**20


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of GPU."""

    name: str
    """As NVML says it, without "NVIDIA" and "GeForce"."""
    capability: tuple[int, int]
    """CUDA compute capability. bitsandbytes' `_gemm_4bit_use_custom_cuda` and torch's `sdp_utils.cpp` decide by it."""
    multiprocessors: int
    """Streaming multiprocessors. bitsandbytes' `_gemm_4bit_use_custom_cuda` compares block counts with it."""
    memory_bytes: int
    """What NVML reports as total."""

    @property
    def workspace_bytes(self) -> int:
        """Workspace of one cuBLAS handle on one stream.

        `getChosenWorkspaceSize` in ATen/cuda/CublasHandlePool.cpp: 32 MiB (4096 KiB x 8) on Hopper and newer, and
        4096 KiB x 2 + 16 KiB x 8 elsewhere.
        """
        return 32 * _MIB if self.capability[0] >= 9 else 2 * 4 * _MIB + 8 * 16 * 1024

    @property
    def lt_workspace_bytes(self) -> int:
        """What cuBLASLt, which adds a bias or a matrix in the same product, holds beside that from its first product on.

        `getCUDABlasLtWorkspaceSize` in ATen/cuda/CublasHandlePool.cpp: 1024 KiB of its own. Measured so on an H100 with torch 2.11; torch 2.13 takes
        the other one's by default (`TORCH_CUBLASLT_UNIFIED_WORKSPACE`).
        """
        return _MIB

    @property
    def prefers_cudnn_attention(self) -> bool:
        """`priority_order` and `check_prefer_cudnn_attention` in ATen/native/transformers/cuda/sdp_utils.cpp: Hopper and Blackwell's
        data centre cards (compute capability 9.0 and 10.0) take cuDNN's kernels first, all others flash attention.
        """
        return self.capability in ((9, 0), (10, 0))


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        # Multiprocessors: the architectures' white papers named in `hpc_core.bounds.datasheet`. Memory: the H100's as NVML
        # reported it in our runs; the others' nominal size less what the driver keeps is not known here, so nominal.
        Gpu(name="H100 80GB HBM3", capability=(9, 0), multiprocessors=132, memory_bytes=85_520_809_984),
        Gpu(name="H200", capability=(9, 0), multiprocessors=132, memory_bytes=141 * 10**9),
        Gpu(name="A100-SXM4-80GB", capability=(8, 0), multiprocessors=108, memory_bytes=80 * _GIB),
        Gpu(name="RTX 4090", capability=(8, 9), multiprocessors=128, memory_bytes=24 * _GIB),
        Gpu(name="RTX 5090", capability=(12, 0), multiprocessors=170, memory_bytes=32 * _GIB),
    )
}
DEFAULT = "H100 80GB HBM3"


def gpu_named(name: str) -> Gpu:
    """The kind of GPU that a name, or an unambiguous part of it, means; capitals do not matter.

    Raises:
        PredictError: no kind, or several, are called so.
    """
    wanted = name.lower().replace("nvidia", "").replace("geforce", "").split()
    found = [gpu for gpu in GPUS.values() if all(word in gpu.name.lower().replace("-", " ") for word in wanted)]
    if len(found) == 1 and wanted:
        return found[0]
    trouble = f"{len(found)} kinds of GPU are" if found else "No kind of GPU is"
    raise PredictError(f"{trouble} called {name!r} here. Say one of: {', '.join(GPUS)}.")
