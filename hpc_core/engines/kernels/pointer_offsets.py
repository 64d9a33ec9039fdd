"""Where tensors lie from each other: a launch gets the first one's address, and reaches the others by these."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["distances"]


def distances(tensors: Sequence[torch.Tensor]) -> tuple[int, int]:
    """Elements from the first tensor's beginning to those of the second and third, 0 where there is none: all device memory has one address space."""
    addresses = [tensor.data_ptr() for tensor in tensors] + [0] * (3 - len(tensors))
    width = tensors[0].element_size() if tensors else 1
    far = [(address - addresses[0]) // width if address else 0 for address in addresses[1:3]]
    return far[0], far[1]
