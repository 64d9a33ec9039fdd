"""Strides that GPU kernels produce and torch's fake versions do not. Later operators choose their kernels by them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

_VIEWS = {"view", "_unsafe_view", "reshape", "_reshape_alias"}


def with_real_strides(name: str, inputs: list[torch.Tensor], out: Any) -> Any:
    """Return the outputs of an operator with the strides of the real one.

    cuDNN's attention returns its output in the query's layout: `alloc_with_matching_layout` in ATen/native/cudnn/MHA.cpp. The strides of
    a view with dimensions of size one come from `computeStride` in ATen/TensorUtils.cpp, which the fake view implements differently.
    """
    if name == "_scaled_dot_product_cudnn_attention" and out[0].shape == inputs[0].shape:
        return (torch.empty_like(inputs[0]), *out[1:])
    if name in _VIEWS and 1 in out.shape:
        source = inputs[0]
        strides = _viewed(tuple(source.shape), source.stride(), tuple(out.shape))
        if strides is not None and strides != out.stride():
            return torch.as_strided(source, out.shape, strides, source.storage_offset())
    return out


@functools.lru_cache(maxsize=4096)
def _viewed(shape: tuple[int, ...], strides: tuple[int, ...], wanted: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the strides of a view, from torch on a tensor without storage, or None if no view exists and torch would copy."""
    with unset_fake_temporarily():
        real = torch.empty_strided(shape, strides, device="meta")
        try:
            return real.view(wanted).stride()
        except RuntimeError:
            return None
