"""Imports in a process that will fork: what asks for a GPU there must not touch CUDA, or no child could use it."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from hpc_core.record.environment import compute_capability

__all__ = ["gpus_by_nvml"]

_CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"


@contextlib.contextmanager
def gpus_by_nvml() -> Iterator[None]:
    """In the block NVML says whether there is a GPU, and of which compute capability, where torch would ask CUDA.

    `torch.cuda.is_available()` through the CUDA runtime would spoil every fork. And transformers imports torchao where that is installed,
    which asks on import (0.18, `prototype.mx_formats.kernels`) for the capability, and whether the GPU can run triton, for which torch asks
    for the device's properties: both initialize CUDA.
    """
    said = os.environ.get(_CHECK)
    os.environ[_CHECK] = "1"
    try:
        with _capability():
            yield
    finally:
        if said is None:
            os.environ.pop(_CHECK, None)
        else:
            os.environ[_CHECK] = said


@contextlib.contextmanager
def _capability() -> Iterator[None]:
    known = None if importlib.util.find_spec("torchao") is None else compute_capability()
    if known is None:
        yield
        return
    cuda: Any = importlib.import_module("torch").cuda
    asked: Any = importlib.import_module("torch._dynamo.device_interface").CudaInterface.Worker
    kept = cuda.get_device_capability, asked.get_device_properties
    seen = SimpleNamespace(major=known[0], minor=known[1])
    cuda.get_device_capability = lambda device=None: known
    asked.get_device_properties = staticmethod(lambda device=None: seen)
    try:
        yield
    finally:
        cuda.get_device_capability, asked.get_device_properties = kept[0], staticmethod(kept[1])
