"""The packed layout of activations, and the block sizes of products."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from hpc_core.engines.kernels.layout import FOR_CPU, packed_layout, tried


@given(rows=st.integers(1, 4), eights=st.integers(1, 9), seed=st.integers(0, 99))
def test_the_packed_layout_is_the_kernels(rows: int, eights: int, seed: int) -> None:
    """Each value is at the kernels' `packed_place`: element i is the (i % 2)th of pair i // 8 of part i % 8 // 2."""
    width = 8 * eights
    values = torch.randperm(rows * width, generator=torch.Generator().manual_seed(seed)).view(rows, -1)
    stored = packed_layout(values)
    for index in range(width):
        place = (index % 8 // 2 * eights + index // 8) * 2 + index % 2
        assert torch.equal(stored[:, place], values[:, index])


def test_the_first_two_of_each_eight_come_first() -> None:
    """Two words of eight elements are stored in pairs."""
    assert packed_layout(torch.arange(16)).tolist() == [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]


@given(batch=st.integers(2, 32))
def test_block_sizes_hold_whole_blocks_of_constants(batch: int) -> None:
    """Blocks hold whole blocks of constants, and some do not look codes up by permutes, as float32 needs."""
    every = tried(batch, four_bit=True)
    assert all(blocks.k % 8 == 0 and (blocks.k // 8).bit_count() == 1 for blocks in (*every, FOR_CPU["4-bit"]))
    assert any(not blocks.permutes for blocks in every)
    assert len(every) == 6, "tests/engines/test_gpu.py checks six candidates"


def test_a_note_says_how_a_product_is_divided() -> None:
    """The text gives rows, columns, warps, loads ahead, and whether codes are permuted."""
    assert tried(4, four_bit=True)[0].text == "blocks (32, 32, 4, 4, True)"
