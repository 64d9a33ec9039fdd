"""How many kernels and copies an operator launches on a GPU.

Most operators launch one kernel. Those that launch more are listed here with the reason.

A matrix product may launch two: cuBLAS can split a long reduction and add the parts in a second kernel. Its heuristics are not
public, so `cublas_h100.json` tabulates what an H100 launched. A product that is not in the table takes the count of the nearest
one that is, by the ratios of its sizes.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import math
from collections import Counter
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

_NONE = {
    *("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"),
    *("detach", "alias", "lift_fresh", "set_", "resize_", "is_pinned", "_has_compatible_shallow_copy_type"),
    *("view", "_unsafe_view", "_reshape_alias", "reshape"),
}
"""Operators that launch nothing: uninitialized memory, and views whose schema does not mark them as views."""

_BEYOND_ONE = {
    "slice_backward": 1,  # zeros, then a copy into the slice
    "select_backward": 1,
    "constant_pad_nd": 1,  # a fill, then a copy into the middle
    "nll_loss_backward": 1,  # zeros, then one number per row
    "cumsum": 1,  # cub::DeviceScan starts with an initialization kernel
    "_safe_softmax": 4,  # softmax, then for rows that are masked out: eq, all, fill, where
    # Row sums of output times gradient before the main kernel, and a cast of the queries' gradients after it.
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
"""Tensor lists of a fused Adam: parameters, gradients and two moments."""

_COPIES = {"clone", "_to_copy", "copy_", "contiguous"}


class Launches:
    """Count what was launched so far."""

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
            self.copies += 1  # a full matrix to add to is copied to the output first
        kernels = _kernels(name, args, inputs)
        self.kernels += kernels
        self.by_operator[str(func)] += kernels

    def add_inside(self, name: str, kernels: int) -> None:
        """Count kernels that an operator launches internally, without dispatching another operator."""
        self.kernels += kernels
        self.by_operator[name] += kernels


_KEYS_OF_ONE_BLOCK = 512
_HEADS_THAT_FILL = 128


def _by_copy_engine(name: str, args: tuple[Any, ...], inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> bool:
    """Return whether this is a plain memcpy. `copy_device_to_device` in ATen/native/cuda/Copy.cu uses one for equal dtypes and layouts."""
    if name == "pow" and isinstance(args[1], int | float) and args[1] == 1:
        return True  # `pow_tensor_scalar` copies its base for exponent 1, which the backward of a square uses
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
        return 0  # an empty index writes nothing
    if name == "addmm":
        return product_kernels(*args[1:3])
    if name == "embedding_dense_backward":
        # embedding_dense_backward_cuda: zeros, then one kernel for few ids; for more ids a radix sort, then segments.
        return 2 if args[1].numel() <= _FEW_IDS else 5
    if name == "_scaled_dot_product_cudnn_attention":
        return 1 + _splits_keys(*args[:2])
    if name == "_scaled_dot_product_cudnn_attention_backward":
        # Row sums of output times gradient before, a cast of the queries' gradients after. Keys and values that several heads
        # share take one sum over the heads each (fmha_reduce_head, measured on an H100).
        query, key = args[1:3]
        return 3 if query.shape[1] == key.shape[1] else 5
    return 1 + _BEYOND_ONE.get(name, 0)


def _splits_keys(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Return whether cuDNN splits a head's keys over several blocks and combines them in a second kernel.

    Measured on an H100 (torch 2.11, bench/studies/prediction/attention-h100.json): it splits for one query per head, more than 512 keys, and up to
    64 key heads in the batch, and not for 256 heads. The threshold between was not measured. 128 is assumed, since that many heads
    fill 132 multiprocessors.
    """
    batch, heads, keys = key.shape[:3]
    return query.shape[2] == 1 and keys > _KEYS_OF_ONE_BLOCK and batch * heads < _HEADS_THAT_FILL


def multi_tensor_launches(sizes: list[int], depth: int) -> int:
    """Return the launches of `multi_tensor_apply` for `depth` lists of tensors with `sizes` elements.

    A launch is full when it holds the maximum number of tensors or of blocks. A block takes one chunk of one tensor.
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


_NARROW = 64
_KINDS = {torch.float32: "float32", torch.float16: "half", torch.bfloat16: "half"}
"""float16 and bfloat16 differed in 2 of 1,016 products."""


def product_kernels(left: torch.Tensor, right: torch.Tensor) -> int:
    """Return the kernels of `left` (rows, inner) times `right` (inner, columns) on an H100, without memsets."""
    rows, inner = left.shape
    columns = right.shape[1]
    kind = _KINDS.get(left.dtype)
    layout = _layout(left) + _layout(right)
    if kind is None:
        return 1
    if layout != "nt" and min(rows, inner, columns) > _NARROW:
        return 1  # large gradients of weights and inputs are not split, and not in the table
    return _nearest(f"{kind} {'tn' if layout == 'tt' else layout}", rows, inner, columns)


def _layout(matrix: torch.Tensor) -> str:
    # A single row has both layouts; it counts as row-major.
    return "t" if matrix.stride(0) == 1 and matrix.shape[0] > 1 and matrix.shape[1] > 1 else "n"


@functools.cache
def _nearest(name: str, rows: int, inner: int, columns: int) -> int:
    wanted = tuple(math.log2(size) for size in (rows, inner, columns))
    return min(_table()[name], key=lambda row: sum(abs(a - b) for a, b in zip(wanted, row[0], strict=True)))[1]


@functools.cache
def _table() -> dict[str, list[tuple[tuple[float, float, float], int]]]:
    """Map kind and layout to pairs of (log2 of rows, inner, columns) and kernels."""
    text = importlib.resources.files("hpc_core.predict").joinpath("cublas_h100.json").read_text(encoding="utf-8")
    return {
        name: [
            ((math.log2(rows), math.log2(inner), math.log2(columns)), int(count))
            for group in groups
            for inner, columns, counts in group["kernels"]
            for rows, count in zip(group["rows"], counts, strict=True)
        ]
        for name, groups in json.loads(text)["products"].items()
    }
