"""A product with 4-bit weights that are dequantized whole first, and how activations are stored by eights. Needs no triton.

For a batch: looking codes up while multiplying costs more there than writing the weights out and reading them once, which a library's
product does at the speed of memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from hpc_core.build.libraries import library

__all__ = ["multiply_whole", "values_by_eights", "values_in_order"]


def values_by_eights(values: torch.Tensor) -> torch.Tensor:
    """(…, k) stored by eights: the first two of each eight, then the next two of each; see `vector_kernels`."""
    stored: torch.Tensor = values.unflatten(-1, (-1, 4, 2)).transpose(-2, -3).flatten(-3).contiguous()
    return stored


def values_in_order(stored: torch.Tensor) -> torch.Tensor:
    """What `values_by_eights` was given, from what it gave: (…, k)."""
    return _in_order(stored, True).flatten(-3)


@torch.no_grad()
def multiply_whole(
    x: torch.Tensor,
    out: torch.Tensor,
    weights: Sequence[Any],
    biases: Sequence[torch.Tensor],
    *,
    gated: bool,
    by_eights: tuple[bool, bool],
    residual: torch.Tensor | None,
) -> None:
    """out = residual + x · Wᵀ + bias for matrices side by side, or residual + SiLU(x · Gᵀ) · (x · Uᵀ); rounded where plain torch rounds.

    Args:
        x: (batch, columns).
        out: (batch, rows), written in place; must not overlap `x` or `residual`.
        weights: 4-bit parameters of bitsandbytes with a `quant_state`, each (rows, columns); one dense matrix exists at a time.
        biases: one a weight, or none at all.
        gated: whether there are two weights, G and U.
        by_eights: whether `x`, and whether `out` and `residual`, are stored so.
        residual: (batch, rows).
    """
    dequantize = library("bitsandbytes", "Dequantizing weights").functional.dequantize_4bit
    values = values_in_order(x) if by_eights[0] else x
    parts = []
    for number, weight in enumerate(weights):
        dense = dequantize(weight.data, weight.quant_state).to(values.dtype)
        parts.append(functional.linear(values, dense, biases[number] if biases else None))
        del dense
    if gated:
        parts = [functional.silu(parts[0]) * parts[1]]
    result = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    # Kernels that write in the order of `out`: a copy of the whole would be one more of the copies that are counted.
    eights, there = result.unflatten(-1, (-1, 4, 2)), _in_order(out, by_eights[1])
    if residual is None:
        torch.mul(eights, 1, out=there)
    else:
        torch.add(eights, _in_order(residual, by_eights[1]), out=there)


def _in_order(stored: torch.Tensor, by_eights: bool) -> torch.Tensor:
    """A view (…, eights, 4, 2) in the order of the values."""
    view: torch.Tensor = stored.unflatten(-1, (4, -1, 2)).transpose(-2, -3)
    return view if by_eights else stored.view(*stored.shape[:-1], -1, 4, 2)
