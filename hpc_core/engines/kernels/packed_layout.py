"""How activations are stored where 4-bit weights are about: "by eights". Needs no triton."""

from __future__ import annotations

import torch

__all__ = ["values_by_eights"]


def values_by_eights(values: torch.Tensor) -> torch.Tensor:
    """(…, k) stored by eights: the first two of each eight, then the next two of each; see `vector_kernels`."""
    stored: torch.Tensor = values.unflatten(-1, (-1, 4, 2)).transpose(-2, -3).flatten(-3).contiguous()
    return stored
