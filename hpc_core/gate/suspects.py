"""What moved since the baseline and can have changed the work: packages that the case uses, and settings that act where it ran.

A package that is installed and not used is no suspect, even where a library imports it to see what it offers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from hpc_core.case.case import Case
from hpc_core.case.workloads import FinetuneSpec, GenerateSpec
from hpc_core.gate.comparability import Place, moved

_WITHOUT_GPU = ("cpu", "predicted")
_BITS = ("nf4", "fp4", "int8")
_READ_BY: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), package)
    for pattern, package in (
        (r"TRITON_", "triton"),
        (r"TORCH(INDUCTOR|DYNAMO)_", "inductor"),
        (r"BNB_", "bitsandbytes"),
        (r"ACCELERATE_", "accelerate"),
        (r"LIGER_", "liger-kernel"),
        (r"(OMP|GOMP|KMP|MKL)_", "threads"),
        (
            r"PYTORCH_(CUDA|NO_CUDA|ALLOC|TUNABLEOP)|TORCH_(ALLOW_TF32|CUDNN|BLAS)|CU(DA|BLAS|BLASLT|DNN)_|NVIDIA_|NCCL_",
            "cuda",
        ),
        (r"torch\.backends\.(cudnn|cuda\.matmul)", "cuda"),
    )
)
"""What reads a setting; torch reads those that no pattern names."""


def suspects(case: Case, old: Place, new: Place) -> tuple[str, ...]:
    """Return what moved between two runs of a case and can have changed it: "transformers 5.23.0 → 5.24.0", "OMP_NUM_THREADS default → 4".

    Settings are compared only where both sides know theirs.
    """
    on_gpu = new.machine not in _WITHOUT_GPU
    packages = moved(old.stack, new.stack, "absent")
    settings = {} if old.settings is None or new.settings is None else moved(old.settings, new.settings, "default")
    return tuple(
        [text for name, text in packages.items() if uses(case, name, on_gpu=on_gpu)]
        + [text for name, text in settings.items() if uses(case, _reader(name), on_gpu=on_gpu)]
    )


def _reader(setting: str) -> str:
    return next((package for pattern, package in _READ_BY if pattern.match(setting)), "torch")


def uses(case: Case, package: str, *, on_gpu: bool) -> bool:
    """Return whether a case runs code of a package, of torch's compiler ("inductor"), or on several threads ("threads").

    A step of the user's own may use whatever works where it ran; so may an engine that another package registers.
    """
    if package in ("driver", "cuda", "triton", "liger-kernel") and not on_gpu:
        return False
    if package == "threads":
        # A worker runs a tiny model on one thread, whatever the environment says.
        return case.model is None or not case.model.tiny
    needs = _needs(case)
    return needs is None or needs.get(package, True)


def _needs(case: Case) -> Mapping[str, bool] | None:
    """Return which packages a case uses, of those that not every case does; None for code that is not hpc-core's to know."""
    work = case.workload
    kind = None if case.quantization is None else case.quantization.kind
    if isinstance(work, GenerateSpec) and work.engine in ("stock", "graph"):
        own = work.engine == "graph"
        compiles = (own and work.kernels == "inductor") or (not own and work.cache == "static" and work.compiled)
        kernels = own and work.kernels == "triton"
        liger, adam = False, False
    elif isinstance(work, FinetuneSpec) and work.engine in ("stock", "tuned"):
        compiles = work.compile == "layers" or work.fusion in ("linears", "blocks")
        kernels = liger = "liger" in (work.fusion, work.loss)
        adam = "8bit" in work.optimizer
    else:
        return None
    return {
        "peft": case.adapter is not None,
        "bitsandbytes": kind in _BITS or adam,
        "torchao": kind == "int4",
        "liger-kernel": liger,
        "triton": compiles or kernels,
        "inductor": compiles,
    }
