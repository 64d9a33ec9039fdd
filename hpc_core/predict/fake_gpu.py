"""The fake GPU that the code under test runs on: fake tensors of device "cuda", and patches for what fake tensors cannot do.

No patch changes what a model computes or keeps.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from hpc_core.builders import causal_lm
from hpc_core.case.errors import PredictError, library
from hpc_core.predict import shim
from hpc_core.predict.attention import Attention
from hpc_core.predict.fake_bitsandbytes import fake_bitsandbytes
from hpc_core.predict.policy import ValuePolicy
from hpc_core.predict.watch import GpuWatch
from hpc_core.record.gpus import Gpu

_OWN_KERNELS = ("silu_backward", "mish_backward", "native_channel_shuffle", "_fused_rms_norm")
"""Composite operators for which CUDA has kernels (native_functions.yaml). A CPU build lacks them, so autograd would run their
parts instead, with more operators and more memory.
"""


@contextlib.contextmanager
def fake_gpu(gpu: Gpu) -> Iterator[tuple[GpuWatch, ValuePolicy]]:
    """Make tensors of device "cuda" fake, and watch what they would do to the memory of a GPU.

    Raises:
        PredictError: this process did not load the fake CUDA device before torch.
    """
    shim.install_guard()
    _claim_kernels()
    policy = ValuePolicy()
    watch = GpuWatch(gpu, policy)
    masking: Any = library("transformers.masking_utils", "Prediction")
    if importlib.util.find_spec("bitsandbytes") is not None:
        # Before anything is fake: its tables of codes, made when it is imported, would be fake tensors for the whole process, of
        # a mode that ends with this prediction, and would reach native code without an address.
        library("bitsandbytes", "Prediction")
    with contextlib.ExitStack() as stack:
        # transformers mistakes fake tensors for tracing and would build a mask that a real run omits.
        stack.enter_context(mock.patch.object(masking, "is_tracing", _no))
        stack.enter_context(mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", Attention(gpu)))
        stack.enter_context(mock.patch.object(torch.nn.Module, "_apply", _apply))
        # Values do not matter, and a CUDA random number generator needs a GPU.
        stack.enter_context(mock.patch.object(causal_lm, "_fill", _filled))
        # autocast finds no GPU and would disable itself.
        stack.enter_context(mock.patch("torch.cuda.amp.common.amp_definitely_not_available", _no))
        stack.enter_context(mock.patch("torch.cuda.is_bf16_supported", _yes))
        stack.enter_context(mock.patch("torch.cuda.get_device_capability", _always(gpu.capability)))
        # bitsandbytes' optimizers wait for the GPU after every parameter.
        stack.enter_context(mock.patch("torch.cuda.synchronize", _nothing))
        stack.enter_context(mock.patch.object(torch, "compile", _compile))
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(watch)
        if importlib.util.find_spec("bitsandbytes") is not None:
            stack.enter_context(fake_bitsandbytes())
        yield watch, policy


# Plain functions instead of mocks: a mock keeps the arguments of its calls, and with them the tensors, alive.


def _no(*_: object, **__: object) -> bool:
    return False


def _yes(*_: object, **__: object) -> bool:
    return True


def _always(value: object) -> Callable[..., object]:
    return lambda *_: value


def _nothing(*_: object, **__: object) -> None:
    """Replace `torch.cuda.synchronize`: there is nothing to wait for."""


def _compile(model: Any = None, **_: object) -> Any:
    """Replace `torch.compile`, as a call and as a decorator, by a function that refuses to run.

    Dynamo skips functions under a dispatch mode, so the watch would see operators that a real run fuses.
    """

    def refused(*_: object, **__: object) -> None:
        name = getattr(model, "__qualname__", type(model).__name__)
        raise PredictError(
            f"torch.compile cannot be predicted: the kernels that {name} would compile to, and their memory, are unknown. "
            "Predict the case without it, or measure it on a GPU."
        )

    if isinstance(model, torch.nn.Module):
        refused()
    return _compile if model is None else refused


def _filled(tensor: torch.Tensor, *_: object) -> torch.Tensor:
    return tensor.normal_(0.0, causal_lm.STD)


def _apply(self: torch.nn.Module, fn: Any, recurse: bool = True) -> torch.nn.Module:
    """Replace `Module._apply`, which refuses to give a fake parameter data of another device. Parameters stay the objects they are."""
    if recurse:
        for child in self.children():
            child._apply(fn)
    with torch.no_grad():
        stores: Any = (self._parameters, self._buffers)
        for store in stores:
            for name, held in store.items():
                if held is None:
                    continue
                changed = fn(held)
                if not isinstance(held, FakeTensor):
                    store[name] = (
                        torch.nn.Parameter(changed, held.requires_grad) if store is self._parameters else changed
                    )
                    continue
                _become(held, changed)
                if held.grad is not None:
                    _become(held.grad, fn(held.grad))
    return self


def _become(tensor: Any, other: Any) -> None:
    if other is not tensor:
        tensor.data, tensor.fake_device = other, other.fake_device


@functools.cache
def _claim_kernels() -> torch.library.Library:
    """Register the missing CUDA kernels for the life of the process. Fake tensors never call them."""
    library_of_claims = torch.library.Library("aten", "IMPL")
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in _OWN_KERNELS:
        if not has(f"aten::{name}", "CUDA"):
            library_of_claims.impl(name, _never, "CUDA")
    return library_of_claims


def _never(*_: Any, **__: Any) -> None:
    raise AssertionError("a fake tensor reached a kernel")
