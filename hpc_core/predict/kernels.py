"""How many kernels and copies an operator launches on a GPU.

Most launch one kernel. What launches more is listed with its reason; matrix products have a table of their own (`products`).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from hpc_core.predict.products import product_kernels

__all__ = ["Launches", "multi_tensor_launches"]

_NONE = {
    *("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"),
    *("detach", "alias", "lift_fresh", "set_", "resize_", "is_pinned", "_has_compatible_shallow_copy_type"),
    *("view", "_unsafe_view", "_reshape_alias", "reshape"),
}
"""Operators that launch nothing: memory without content, and views that do not say that they are."""

_BEYOND_ONE = {
    "slice_backward": 1,  # zeros, then a copy into the slice
    "select_backward": 1,
    "constant_pad_nd": 1,  # a fill, then a copy into the middle
    "nll_loss_backward": 1,  # zeros, then one number a row
    "cumsum": 1,  # cub::DeviceScan starts with a kernel of its own
    "_safe_softmax": 4,  # softmax, then rows that are masked out: eq, all, where with a zero that is filled in first
    # Row sums of output times gradient before, and queries' gradients from float32 after the main kernel.
    "_scaled_dot_product_flash_attention_backward": 2,
    "_scaled_dot_product_efficient_attention_backward": 1,
}

_FEW_IDS = 3072
"""`embedding_dense_backward_cuda` in ATen/native/cuda/Embedding.cu."""
_CHUNK = 65536
_MOST_BLOCKS = 320
_MOST_TENSORS = (110, 64, 48, 36, 30)
"""`kChunkSize`, `depth_to_max_blocks` and `depth_to_max_tensors` of ATen/native/cuda/MultiTensorApply.cuh."""
_FUSED_DEPTH = 4
"""Lists that a fused Adam walks along together: parameters, gradients and two moments."""

_COPIES = {"clone", "_to_copy", "copy_", "contiguous"}


class Launches:
    """What was launched so far."""

    def __init__(self) -> None:
        self.kernels = 0
        self.copies = 0
        self.by_operator: Counter[str] = Counter()

    def add(
        self, func: Any, name: str, args: tuple[Any, ...], inputs: list[torch.Tensor], outputs: list[torch.Tensor]
    ) -> None:
        """Count one operator on CUDA tensors."""
        if func.is_view or name in _NONE:
            return
        if _by_copy_engine(name, args, inputs, outputs):
            self.copies += 1
            return
        if name == "addmm" and args[0].shape == outputs[0].shape:
            self.copies += 1  # a whole matrix to add to is copied to where the product is added
        kernels = _kernels(name, args, inputs)
        self.kernels += kernels
        self.by_operator[str(func)] += kernels

    def add_inside(self, name: str, kernels: int) -> None:
        """Count kernels that an operator launches through others that are not dispatched."""
        self.kernels += kernels
        self.by_operator[name] += kernels


_KEYS_OF_ONE_BLOCK = 512
_HEADS_THAT_FILL = 128


def _by_copy_engine(name: str, args: tuple[Any, ...], inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> bool:
    """Whether this is a plain memcpy: `copy_device_to_device` in ATen/native/cuda/Copy.cu takes one for equal dtypes and layouts."""
    if name == "pow" and isinstance(args[1], int | float) and args[1] == 1:
        return True  # `pow_tensor_scalar` copies its base for this exponent: the backward of every square
    if name == "constant_pad_nd" and not any(args[1]):
        return True  # padding by nothing is a clone
    if name not in _COPIES or not inputs or not outputs:
        return False
    source, target = inputs[-1], outputs[0]
    if not isinstance(source, FakeTensor) or not isinstance(target, FakeTensor):
        return True
    if source.fake_device.type != target.fake_device.type:
        return True
    if source.dtype != target.dtype:
        return False
    if source.is_contiguous() and target.is_contiguous():
        return True
    dense = bool(torch._prims_common.is_non_overlapping_and_dense_or_false(source))
    return dense and source.stride() == target.stride()


def _kernels(name: str, args: tuple[Any, ...], inputs: list[torch.Tensor]) -> int:
    if name.startswith("_foreach_"):
        lists = [
            value for value in args if isinstance(value, list | tuple) and value and isinstance(value[0], torch.Tensor)
        ]
        depth = len(lists) + (
            0 if name.endswith("_") else 1
        )  # where nothing is changed in place, a list of results too
        return multi_tensor_launches([tensor.numel() for tensor in lists[0]], depth)
    if name.startswith("_fused_adam"):
        return multi_tensor_launches([tensor.numel() for tensor in args[0]], _FUSED_DEPTH)
    if name == "mm":
        return product_kernels(*args[:2])
    if name in ("index_put_", "_index_put_impl_") and any(index is not None and not index.numel() for index in args[1]):
        return 0  # nothing is put anywhere
    if name == "addmm":
        return product_kernels(*args[1:3])
    if name == "embedding_dense_backward":
        # embedding_dense_backward_cuda: zeros, then one kernel for few ids; for more a radix sort of them, then segments.
        return 2 if args[1].numel() <= _FEW_IDS else 5
    if name == "_scaled_dot_product_cudnn_attention":
        return 1 + _splits_keys(*args[:2])
    if name == "_scaled_dot_product_cudnn_attention_backward":
        # Row sums of output times gradient before, queries' gradients from float32 after; of keys and values that several
        # heads share, one sum over the heads each (seen on an H100: fmha_reduce_head).
        query, key = args[1:3]
        return 3 if query.shape[1] == key.shape[1] else 5
    return 1 + _BEYOND_ONE.get(name, 0)


def _splits_keys(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether cuDNN lets several blocks share a head's keys, and a second kernel put their parts together.

    Seen on an H100 (torch 2.11, docs/data/attention-h100.json): one query a head, more than 512 keys, and 64 or fewer key heads in the batch; not with
    256. Where between those it changes was not looked for: 132 multiprocessors make it likely that 128 are enough to fill them.
    """
    batch, heads, keys = key.shape[:3]
    return query.shape[2] == 1 and keys > _KEYS_OF_ONE_BLOCK and batch * heads < _HEADS_THAT_FILL


def multi_tensor_launches(sizes: list[int], depth: int) -> int:
    """Launches of `multi_tensor_apply` over lists of tensors with so many numbers each, `depth` lists side by side.

    A launch ends when it is full of tensors or of blocks; a block takes one chunk of one tensor.
    """
    launches, tensors, blocks = 0, 0, 0
    for size in sizes:
        if size == 0:
            continue
        tensors += 1
        chunks = -(-size // _CHUNK)
        for chunk in range(chunks):
            blocks += 1
            last = chunk == chunks - 1
            if blocks == _MOST_BLOCKS or (last and tensors == _MOST_TENSORS[depth - 1]):
                launches += 1
                blocks, tensors = 0, 0 if last else 1
    return launches + (blocks > 0)
