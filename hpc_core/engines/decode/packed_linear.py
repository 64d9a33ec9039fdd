"""Products with torchao's int4 weights as the engine takes them: the packed tensors themselves, for torch's tinygemm kernels.

torchao's own linear pads its input even where nothing is to be padded, which copies it each time; this does not. Plain tensors can be
handed to torch.compile as arguments, so that one compiled layer serves all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional

__all__ = ["PackedLinear", "PackedWeight", "times"]

aten: Any = torch.ops.aten


class PackedWeight(NamedTuple):
    """A weight as torchao packed it; nothing is copied."""

    codes: torch.Tensor
    """Packed for the device: see `build.packed_int4`."""
    scale_and_zero: torch.Tensor
    """(columns with padding / group, rows with padding, 2), bfloat16."""
    group: int
    """Weights of a row that share a scale and a zero."""
    rows: int
    """Of the weight without padding."""


class PackedLinear:
    """Stands for a linear layer with an int4 weight."""

    def __init__(self, module: Any):
        packed = module.weight
        self.weight = PackedWeight(
            packed.qdata, packed.scale_and_zero, int(packed.block_size[-1]), int(module.out_features)
        )
        self.bias = module.bias
        self.in_features, self.out_features = int(module.in_features), int(module.out_features)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output (…, out) of x (…, in)."""
        return times(x, self.weight, self.bias)


def times(x: torch.Tensor, weight: torch.Tensor | PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (…, in) times the weight's transpose, plus the bias: (…, out), whether the weight is plain or packed."""
    if not isinstance(weight, PackedWeight):
        return functional.linear(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1])
    missing = weight.scale_and_zero.shape[0] * weight.group - x.shape[-1]
    if missing:
        flat = functional.pad(flat, (0, missing))
    product = aten._weight_int4pack_mm if x.is_cuda else aten._weight_int4pack_mm_for_cpu
    whole: torch.Tensor = product(flat, weight.codes, weight.group, weight.scale_and_zero)[:, : weight.rows]
    whole = whole.reshape(*x.shape[:-1], weight.rows)
    return whole if bias is None else whole + bias
