"""The table of GPUs: what predictions, bounds and reports know about each model.

To add a GPU, add a line to `gpus.jsonl`. Rates are dense, without sparsity, and accumulate in float32 where consumer cards differ
(GeForce halves them there). A T4 emulates bfloat16, so float16's rate bounds it.
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from hpc_core.case.errors import PredictError
from hpc_core.record.record import Machine
from hpc_core.record.units import quantity

_MIB = 2**20
_VENDOR = ("NVIDIA ", "GeForce ", "AMD Instinct ")


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
    """Total memory as NVML and torch report it where we measured it (H100, H200), else as `nvidia-smi` prints it, or the nominal size."""
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
        4096 KiB x 2 + 16 KiB x 8 elsewhere. On ROCm 128 MiB for gfx94 (MI300X).
        """
        if self.rocm:
            return 128 * _MIB
        return 32 * _MIB if self.capability[0] >= 9 else 2 * 4 * _MIB + 8 * 16 * 1024

    @property
    def lt_workspace_bytes(self) -> int:
        """Workspace of cuBLASLt, which runs products that add a bias or a matrix.

        `getCUDABlasLtWorkspaceSize` in ATen/cuda/CublasHandlePool.cpp: 1024 KiB, confirmed on an H100 with torch 2.11. torch 2.13
        shares the cuBLAS workspace by default (`TORCH_CUBLASLT_UNIFIED_WORKSPACE`). hipBLASLt: 76 MiB.
        """
        return 76 * _MIB if self.rocm else _MIB

    @property
    def rocm(self) -> bool:
        """Whether torch reaches it through ROCm: the caching allocator is the same code, the libraries' workspaces are not."""
        return self.name.startswith("MI")

    @property
    def prefers_cudnn_attention(self) -> bool:
        """Whether attention tries cuDNN's kernels first, and not flash attention.

        `priority_order` and `check_prefer_cudnn_attention` in ATen/native/transformers/cuda/sdp_utils.cpp: Hopper and the data
        centre cards of Blackwell (compute capability 9.0 and 10.0) do.
        """
        return self.capability in ((9, 0), (10, 0))


class _Row(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A line of the table: a GPU with its rates in tera per second."""

    name: str
    aliases: tuple[str, ...] = ()
    capability: tuple[int, int]
    multiprocessors: int
    memory_bytes: int
    tera_per_s: dict[str, float]
    bytes_per_s: float
    l2_bytes: int
    source: str


DEFAULT = "H100 80GB HBM3"
"""The GPU that predictions are for unless a user names another."""


def _table() -> dict[str, Gpu]:
    lines = Path(__file__).with_name("gpus.jsonl").read_bytes().splitlines()
    found = {}
    for row in (msgspec.json.decode(line, type=_Row) for line in lines):
        sizes = {name: getattr(row, name) for name in row.__struct_fields__ if name != "tera_per_s"}
        rates = {dtype: rate * 1e12 for dtype, rate in row.tera_per_s.items()}
        found[row.name] = Gpu(**sizes, flop_per_s=rates)
    return found


GPUS: dict[str, Gpu] = _table()


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


def with_memory(gpu: Gpu, memory_bytes: int | None) -> Gpu:
    """Return a card of another size that follows the same rules, named "RTX 4090 with 48.00 GiB"; the GPU itself for None or its own size."""
    if memory_bytes in (None, gpu.memory_bytes):
        return gpu
    assert memory_bytes is not None
    return msgspec.structs.replace(
        gpu, name=f"{gpu.name} with {quantity(memory_bytes, 'bytes')}", memory_bytes=memory_bytes
    )


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
