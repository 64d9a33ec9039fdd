"""How the launches of products are cut, and which cuts are tried on a GPU. Needs no triton."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["ANYWHERE", "CANDIDATES", "FOR_CPU", "Blocks"]


class Blocks(NamedTuple):
    """How one launch is cut: rows and columns (words for 4-bit) of the matrix a program takes at a time."""

    n: int
    k: int
    warps: int
    stages: int = 1
    """Batch above 1: loads ahead."""
    permutes: bool = False
    """4-bit, batch 1: look codes up by byte permutes instead of loads."""


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
_FOUR_BIT_ROWS = tuple(
    Blocks(*sizes)
    for sizes in ((16, 64, 4, 2), (32, 64, 4, 2), (16, 128, 4, 2), (64, 32, 4, 2), (32, 32, 4, 3), (32, 64, 8, 1))
)
ANYWHERE = Blocks(16, 256, 4, 1)
FOR_CPU = {"plain": ANYWHERE, "4-bit": Blocks(16, 32, 4, 1)}
"""For triton's interpreter, which has no use for speed."""

CANDIDATES = {
    ("plain", True): _PLAIN_VECTOR,
    ("plain", False): _PLAIN_ROWS,
    ("4-bit", True): _FOUR_BIT_VECTOR,
    ("4-bit", False): _FOUR_BIT_ROWS,
}
"""By kind, and whether the batch is 1."""
