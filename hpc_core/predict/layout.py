"""Strides that a GPU's kernels give and torch's fakes do not: later operators choose by them which product or copy they are."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

__all__ = ["laid_out"]

_VIEWS = {"view", "_unsafe_view", "reshape", "_reshape_alias"}


def laid_out(name: str, inputs: list[torch.Tensor], out: Any) -> Any:
    """The outputs of an operator with the strides of the real one.

    cuDNN's attention answers in the query's layout: `alloc_with_matching_layout` in ATen/native/cudnn/MHA.cpp. A view that gains or keeps
    dimensions of one gets strides by `computeStride` in ATen/TensorUtils.cpp, of which the fake view is another version.
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
    """Strides of a view, by torch itself on a tensor without storage; None where it is none and copies."""
    with unset_fake_temporarily():
        real = torch.empty_strided(shape, strides, device="meta")
        try:
            return real.view(wanted).stride()
        except RuntimeError:
            return None
