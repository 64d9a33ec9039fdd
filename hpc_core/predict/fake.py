"""The fake GPU that the code under test runs on: fake tensors of device "cuda", and what must be told or taken from it for that.

Every patch here stands in for something that fake tensors cannot do; none changes what a model computes or keeps.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hpc_core.builders import drawn
from hpc_core.builders.libraries import library
from hpc_core.case.errors import PredictError
from hpc_core.predict import shim
from hpc_core.predict.attention import Attention
from hpc_core.predict.policy import Answers
from hpc_core.predict.quantized import fake_bitsandbytes
from hpc_core.predict.watch import GpuWatch
from hpc_core.record.gpus import Gpu

__all__ = ["fake_gpu", "was_moved"]

_OWN_KERNELS = ("silu_backward", "mish_backward", "native_channel_shuffle", "_fused_rms_norm")
"""Composite operators that CUDA has kernels of its own for (native_functions.yaml). A CPU build lacks them, and autograd would take
the parts instead, in more operators and more memory.
"""


@contextlib.contextmanager
def fake_gpu(gpu: Gpu) -> Iterator[tuple[GpuWatch, Answers]]:
    """While active, tensors of device "cuda" are fake, and what they would do to a GPU's memory is watched.

    Raises:
        PredictError: this process did not load the empty CUDA device before torch.
    """
    shim.install_guard()
    _claim_kernels()
    answers = Answers()
    watch = GpuWatch(gpu, answers)
    masking: Any = library("transformers.masking_utils", "Prediction")
    with contextlib.ExitStack() as stack:
        # transformers takes fake tensors for a trace and would build a mask that a real run leaves out.
        stack.enter_context(mock.patch.object(masking, "is_tracing", _no))
        stack.enter_context(mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", Attention(gpu)))
        stack.enter_context(mock.patch.object(torch.nn.Module, "_apply", _apply))
        # Values do not matter, and a generator of random numbers on a GPU cannot be had without one.
        stack.enter_context(mock.patch.object(drawn, "_fill", _filled))
        # autocast asks for a GPU that is not there and would switch itself off.
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
        yield watch, answers


# Functions, and no mocks' `return_value`: a mock remembers what it was called with, and so keeps tensors alive.


def _no(*_: object, **__: object) -> bool:
    return False


def _yes(*_: object, **__: object) -> bool:
    return True


def _always(value: object) -> Callable[..., object]:
    return lambda *_: value


def _nothing(*_: object, **__: object) -> None:
    """Nothing to wait for."""


def _compile(model: Any = None, **_: object) -> Any:
    """In place of `torch.compile`, as a call and as a decorator: what it is given cannot be called. Dynamo would pass by a
    function under a dispatch mode, and the watch would see operators that a real run fuses.
    """

    def refused(*_: object, **__: object) -> None:
        name = getattr(model, "__qualname__", type(model).__name__)
        raise PredictError(
            f"torch.compile has no model here: which kernels {name} would be compiled to, and what they take, is not known. "
            "Predict the case without it, or measure it on a GPU."
        )

    if isinstance(model, torch.nn.Module):
        refused()
    return _compile if model is None else refused


def _filled(tensor: torch.Tensor, *_: object) -> torch.Tensor:
    return tensor.normal_(0.0, drawn.STD)


def _apply(self: torch.nn.Module, fn: Any, recurse: bool = True) -> torch.nn.Module:
    """`Module._apply` for fake parameters: `swap_tensors` refuses them, so they are bound anew, as `.data =` would leave them."""
    if recurse:
        for child in self.children():
            child._apply(fn)
    with torch.no_grad():
        stores: Any = (self._parameters, self._buffers)
        for store in stores:
            for name, held in store.items():
                if held is None:
                    continue
                value = store[name] = _where_it_is_now(held)
                changed = fn(value)
                if changed is not value and (changed.dtype, changed.device) != (value.dtype, value.device):
                    if isinstance(value, torch.nn.Parameter):
                        changed = torch.nn.Parameter(changed, value.requires_grad)
                    setattr(value, _MOVED_TO, weakref.ref(changed))
                    store[name] = changed
    return self


_MOVED_TO = "_hpc_core_moved_to"


def _where_it_is_now(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that two modules share, such as tied embeddings, is moved once and stays shared."""
    moved: Callable[[], torch.Tensor | None] = getattr(tensor, _MOVED_TO, lambda: None)
    return tensor if (found := moved()) is None else _where_it_is_now(found)


def was_moved(tensor: torch.Tensor) -> bool:
    """Whether a module has bound another tensor in this one's place, when it was moved or cast."""
    return hasattr(tensor, _MOVED_TO)


@functools.cache
def _claim_kernels() -> torch.library.Library:
    """Say that CUDA has the kernels, for as long as the process lives: fake tensors never call them."""
    library_of_claims = torch.library.Library("aten", "IMPL")
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in _OWN_KERNELS:
        if not has(f"aten::{name}", "CUDA"):
            library_of_claims.impl(name, _never, "CUDA")
    return library_of_claims


def _never(*_: Any, **__: Any) -> None:
    raise AssertionError("a fake tensor reached a kernel")
