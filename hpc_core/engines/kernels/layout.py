"""Layouts that the kernels share, and how launches of products are divided into programs. Needs no triton.

The packed layout is drawn in `vector`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch


def packed_layout(values: torch.Tensor) -> torch.Tensor:
    """Return a copy of (…, k) values in the packed layout: the first pair of every eight values, then the second pair of every eight, and so on."""
    stored: torch.Tensor = values.unflatten(-1, (-1, 4, 2)).transpose(-2, -3).flatten(-3).contiguous()
    return stored


def pointer_offsets(tensors: Sequence[torch.Tensor]) -> tuple[int, int]:
    """Return the offsets, in elements, from the first tensor to the second and third; 0 where there is none.

    All memory of a device has one address space, so a kernel that gets the first pointer reaches the others too.
    """
    addresses = [tensor.data_ptr() for tensor in tensors] + [0] * (3 - len(tensors))
    size = tensors[0].element_size() if tensors else 1
    offsets = [(address - addresses[0]) // size if address else 0 for address in addresses[1:3]]
    return offsets[0], offsets[1]


class Rows(NamedTuple):
    """Rows of the matrices of one product: of the first, of the second, and of the result."""

    first: int
    second: int
    all: int


class Around(NamedTuple):
    """Pointers to what a product is combined with. Where `Form` says that one is unused, it may be any tensor."""

    bias: torch.Tensor
    """(rows,) of the first matrix."""
    residual: torch.Tensor
    """(batch, n_all), added to the result; may be the result's own buffer."""
    row_scale: torch.Tensor
    """(n_all,) float32, for int8 matrices."""


class FourBitMatrix(NamedTuple):
    """Pointers to a 4-bit matrix and to what decodes it."""

    codes: torch.Tensor
    """(rows * k_size / 8,) int32 words of eight codes."""
    absmax: torch.Tensor
    """One constant for each 64 weights: float32, or a byte that is dequantized first."""
    outer: torch.Tensor
    code: torch.Tensor
    offsets: torch.Tensor
    """What dequantizes a byte; see `four_bit_format.BlockConstants`."""
    table: torch.Tensor
    """(16,) float32: the value of each code."""
    tables: torch.Tensor
    """The bytes of these values, as `four_bit_format.byte_tables` or `copied_tables`."""


@dataclass(frozen=True)
class Form:
    """What is known of a product when its kernel is compiled. Triton compiles a kernel for each value of this."""

    gated: bool
    bias: bool
    residual: bool
    out_packed: bool
    block_n: int
    block_k: int
    early: bool
    k_size: int = 0
    """Columns; 0 where the kernel takes them at run time."""
    x_packed: bool = True
    norm: bool = False
    scaled: bool = False
    whole: bool = False
    """Batch 1: block_k divides the columns, so that the first tile needs no mask."""
    padded: int = 0
    """Batch above 1: rows that x is padded to."""
    stages: int = 1
    """Batch above 1: loads ahead."""
    permutes: bool = False
    """4-bit: look codes up by byte permutes instead of loads."""
    nested: bool = False
    """4-bit: constants are quantized again."""
    bf16: bool = False
    """4-bit at batch 1: activations are bfloat16, else float16."""


@dataclass(frozen=True)
class Heads:
    """What is known of attention when its kernel is compiled."""

    groups: int
    """Heads of keys and values."""
    shared: int
    """Query heads of a group; `shared_padded` is the size of the block that holds them."""
    shared_padded: int
    width: int
    parts: int
    block: int
    """Keys that a program takes at a time."""


class Blocks(NamedTuple):
    """How one launch is divided: rows and columns (words for 4-bit) of the matrix that a program takes at a time."""

    n: int
    k: int
    warps: int
    stages: int = 1
    """Batch above 1: loads ahead."""
    permutes: bool = False
    """4-bit: look codes up by byte permutes instead of loads."""

    @property
    def text(self) -> str:
        """The sizes, for a note."""
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
"""The last one looks codes up by loads. It is the only one for float32, whose values have four bytes, and it fits on any GPU."""
ANYWHERE = Blocks(16, 256, 4, 1)
FOR_CPU = {"plain": ANYWHERE, "4-bit": Blocks(16, 32, 4, 1)}
"""For Triton's interpreter, where speed does not matter."""


def tried(batch: int, *, four_bit: bool) -> tuple[Blocks, ...]:
    """Return the block sizes to try on a GPU for a product of `batch` activation rows. Those that do not fit the GPU's memory are skipped."""
    if batch > 1:
        return _FOUR_BIT_ROWS if four_bit else _PLAIN_ROWS
    return _FOUR_BIT_VECTOR if four_bit else _PLAIN_VECTOR
