"""How many kernels a matrix product launches: whether cuBLAS splits a long reduction and adds the parts in a kernel of its own.

cuBLAS's heuristics are not public, so this is a table of what an H100 launched (`cublas_h100.json`, with its source). A product that
is not in the table takes after the nearest one that is, by the ratios of its sizes.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import math

import torch

__all__ = ["product_kernels"]

_NARROW = 64
_KINDS = {torch.float32: "float32", torch.float16: "half", torch.bfloat16: "half"}
"""float16 and bfloat16 differed in 2 of 1,016 products."""


def product_kernels(left: torch.Tensor, right: torch.Tensor) -> int:
    """Kernels of `left` (rows, inner) times `right` (inner, columns) on an H100, memsets not counted."""
    rows, inner = left.shape
    columns = right.shape[1]
    kind = _KINDS.get(left.dtype)
    layout = _layout(left) + _layout(right)
    if kind is None:
        return 1
    if layout != "nt" and min(rows, inner, columns) > _NARROW:
        return 1  # not in the table: large weight gradients, and large gradients of inputs, which are not split
    return _nearest(f"{kind} {'tn' if layout == 'tt' else layout}", rows, inner, columns)


def _layout(matrix: torch.Tensor) -> str:
    # A single row is both; it counts as a row.
    return "t" if matrix.stride(0) == 1 and matrix.shape[0] > 1 and matrix.shape[1] > 1 else "n"


@functools.cache
def _nearest(name: str, rows: int, inner: int, columns: int) -> int:
    asked = tuple(math.log2(size) for size in (rows, inner, columns))
    return min(_table()[name], key=lambda seen: sum(abs(a - b) for a, b in zip(asked, seen[0], strict=True)))[1]


@functools.cache
def _table() -> dict[str, list[tuple[tuple[float, float, float], int]]]:
    """By kind and layout: the logarithms of rows, inner and columns, and the kernels."""
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
