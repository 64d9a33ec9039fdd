"""Settings outside a case that change what runs: environment variables that libraries read, and torch's switches."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

_VARIABLES = re.compile(
    r"(PYTORCH|TORCH|TORCHINDUCTOR|TORCHDYNAMO|CUBLAS|CUBLASLT|CUDNN|NCCL|TRITON|OMP|GOMP|KMP|MKL|DNNL|ONEDNN|ATEN|BNB|ACCELERATE|"
    r"FLASH_ATTENTION|LIGER|VLLM)_\w+"
    r"|NVIDIA_TF32_OVERRIDE|CUDA_(LAUNCH_BLOCKING|MODULE_LOADING|DEVICE_MAX_CONNECTIONS|FORCE_PTX_JIT|DISABLE_PTX_JIT|CACHE_DISABLE)"
    r"|CUDA_MPS_ACTIVE_THREAD_PERCENTAGE|USE_HUB_KERNELS|DISABLE_KERNEL_MAPPING|PYTHONOPTIMIZE"
)
_PLACES = re.compile(
    r"\w*(VERSION|BUILD|BUILD_NUMBER|HOME|DIR|PATH|ROOT|FILE|FILENAME|CACHE|ARCH_LIST|LOGS|VERBOSE|DEBUG|HOST|IP|PORT|URL|"
    r"KEY|TOKEN|SECRET|PASSWORD)"
)
"""Variables that say where something lies, what it was built for or what is printed; and secrets."""
_LONGEST = 200
_OF_TORCH = "torch."


def _precision(backend: Any, legacy: str = "allow_tf32") -> str:
    """Return how a library multiplies float32: "tf32", "bf16", or "ieee". Before torch 2.9 there is only `allow_tf32`."""
    found = getattr(backend, "fp32_precision", None)
    if found is None:
        found = "tf32" if getattr(backend, legacy) else "ieee"
    return "ieee" if found == "none" else str(found)


_SWITCHES: tuple[tuple[str, str, Callable[[Any], Any]], ...] = (
    ("backends.cuda.matmul.fp32_precision", "ieee", lambda torch: _precision(torch.backends.cuda.matmul)),
    ("backends.cudnn.conv.fp32_precision", "tf32", lambda torch: _precision(_convolutions(torch))),
    ("backends.mkldnn.matmul.fp32_precision", "ieee", lambda torch: _precision(torch.backends.mkldnn.matmul)),
    ("float32_matmul_precision", "highest", lambda torch: torch.get_float32_matmul_precision()),
    *(
        (f"backends.cuda.matmul.{name}", default, lambda torch, name=name: getattr(torch.backends.cuda.matmul, name))
        for name, default in (
            ("allow_fp16_reduced_precision_reduction", "True"),
            ("allow_bf16_reduced_precision_reduction", "True"),
            ("allow_fp16_accumulation", "False"),
        )
    ),
    ("backends.cudnn.enabled", "True", lambda torch: torch.backends.cudnn.enabled),
    ("backends.cudnn.benchmark", "False", lambda torch: torch.backends.cudnn.benchmark),
    ("backends.cudnn.deterministic", "False", lambda torch: torch.backends.cudnn.deterministic),
    ("backends.mkldnn.enabled", "True", lambda torch: torch.backends.mkldnn.enabled),
    ("backends.cuda.flash_sdp", "True", lambda torch: torch.backends.cuda.flash_sdp_enabled()),
    ("backends.cuda.mem_efficient_sdp", "True", lambda torch: torch.backends.cuda.mem_efficient_sdp_enabled()),
    ("backends.cuda.math_sdp", "True", lambda torch: torch.backends.cuda.math_sdp_enabled()),
    ("backends.cuda.cudnn_sdp", "True", lambda torch: torch.backends.cuda.cudnn_sdp_enabled()),
    ("deterministic_algorithms", "False", lambda torch: torch.are_deterministic_algorithms_enabled()),
    ("default_dtype", "torch.float32", lambda torch: torch.get_default_dtype()),
    ("anomaly_mode", "False", lambda torch: torch.is_anomaly_enabled()),
)
"""Name, torch's default, and how it is read."""


def _convolutions(torch: Any) -> Any:
    return getattr(torch.backends.cudnn, "conv", torch.backends.cudnn)


def settings() -> dict[str, str]:
    """Return the settings of this process: variables that are set, and switches of torch that are not as torch has them by default.

    Reads torch only where it is imported already.
    """
    found = {name: value[:_LONGEST] for name, value in sorted(os.environ.items()) if _is_variable(name)}
    torch = sys.modules.get("torch")
    for name, default, read in _SWITCHES if torch is not None else ():
        try:
            value = str(read(torch))
        except (AttributeError, RuntimeError):
            continue  # another torch does not have it; or it was set by a newer name, which the table reads too
        if value != default:
            found[f"{_OF_TORCH}{name}"] = value
    return found


def _is_variable(name: str) -> bool:
    return _VARIABLES.fullmatch(name) is not None and _PLACES.fullmatch(name) is None


def is_setting(name: str) -> bool:
    """Return whether a name is that of a setting, and not of a package."""
    return name.startswith(_OF_TORCH) or name.isupper()


def variables(found: Mapping[str, str]) -> dict[str, str]:
    """Return the settings that are environment variables."""
    return {name: value for name, value in found.items() if not name.startswith(_OF_TORCH)}
