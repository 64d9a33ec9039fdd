"""How activations are stored where 4-bit weights are about: "by eights". Needs no triton.

Where tensors lie from each other: a launch gets the first one's address, and reaches the others by these.

How the launches of products are cut, and which cuts are tried on a GPU. Needs no triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


def values_by_eights(values: torch.Tensor) -> torch.Tensor:
    """(…, k) stored by eights: the first two of each eight, then the next two of each; see `vector_kernels`."""
    stored: torch.Tensor = values.unflatten(-1, (-1, 4, 2)).transpose(-2, -3).flatten(-3).contiguous()
    return stored


def distances(tensors: Sequence[torch.Tensor]) -> tuple[int, int]:
    """Elements from the first tensor's beginning to those of the second and third, 0 where there is none: all device memory has one address space."""
    addresses = [tensor.data_ptr() for tensor in tensors] + [0] * (3 - len(tensors))
    width = tensors[0].element_size() if tensors else 1
    far = [(address - addresses[0]) // width if address else 0 for address in addresses[1:3]]
    return far[0], far[1]


class Blocks(NamedTuple):
    """How one launch is cut: rows and columns (words for 4-bit) of the matrix a program takes at a time."""

    n: int
    k: int
    warps: int
    stages: int = 1
    """Batch above 1: loads ahead."""
    permutes: bool = False
    """4-bit: look codes up by byte permutes instead of loads."""

    @property
    def said(self) -> str:
        """For a note: how the product is cut."""
        return f"blocks {tuple(self)}"


_PLAIN_VECTOR = tuple(
    Blocks(*sizes)
    for sizes in (
        (4, 1024, 4),
        (2, 1024, 4),
        (8, 512, 4),
        (1, 2048, 4),
        (4, 512, 4),
        (4, 512, 2),
        (16, 256, 4),
        (2, 512, 2),
    )
)
_BY_BYTES = ((8, 128, 4), (16, 128, 4), (4, 128, 4), (16, 64, 4), (8, 64, 2), (8, 32, 1), (16, 32, 2), (8, 256, 8))
_BY_LOADS = ((8, 128, 4), (16, 64, 4))
_FOUR_BIT_VECTOR = (
    *(Blocks(*sizes, permutes=True) for sizes in _BY_BYTES),
    *(Blocks(*sizes) for sizes in _BY_LOADS),
)
_PLAIN_ROWS = tuple(
    Blocks(*sizes)
    for sizes in (
        (16, 256, 4, 3),
        (32, 128, 4, 4),
        (16, 128, 4, 4),
        (64, 128, 4, 3),
        (32, 256, 8, 3),
        (16, 512, 4, 2),
        (128, 64, 4, 4),
    )
)
_FOUR_BIT_ROWS = (
    *(
        Blocks(*sizes, permutes=True)
        for sizes in ((32, 32, 4, 4), (64, 32, 4, 3), (16, 64, 8, 5), (32, 64, 8, 4), (32, 32, 4, 6))
    ),
    Blocks(16, 32, 4, 2),
)
"""The last one looks codes up by loads: the only one for float32, whose values have four bytes, and small enough for any card."""
ANYWHERE = Blocks(16, 256, 4, 1)
FOR_CPU = {"plain": ANYWHERE, "4-bit": Blocks(16, 32, 4, 1)}
"""For triton's interpreter, which has no use for speed."""


def tried(batch: int, *, four_bit: bool) -> tuple[Blocks, ...]:
    """The cuts that are tried on a GPU for a product of so many rows, where they fit its matrices and type; one that a card has no room for is passed over."""
    if batch > 1:
        return _FOUR_BIT_ROWS if four_bit else _PLAIN_ROWS
    return _FOUR_BIT_VECTOR if four_bit else _PLAIN_VECTOR
