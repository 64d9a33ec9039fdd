"""The packed layout of activations, and the block sizes of products."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from hpc_core.engines.kernels.layout import FOR_CPU, packed_layout, tried


@given(rows=st.integers(1, 4), eights=st.integers(1, 9), seed=st.integers(0, 99))
def test_the_packed_layout_holds_every_value_where_the_kernels_look(rows: int, eights: int, seed: int) -> None:
    """Element i of k is the (i % 2)th of pair (i // 8) among those that come (i % 8 // 2)th: `packed_place` of the kernels."""
    width = 8 * eights
    values = torch.randperm(rows * width, generator=torch.Generator().manual_seed(seed)).view(rows, -1)
    stored = packed_layout(values)
    for index in range(width):
        place = (index % 8 // 2 * eights + index // 8) * 2 + index % 2
        assert torch.equal(stored[:, place], values[:, index])


def test_the_first_two_of_each_eight_come_first() -> None:
    """Two words of eight elements, stored in pairs."""
    assert packed_layout(torch.arange(16)).tolist() == [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]


@given(batch=st.integers(2, 32))
def test_a_batch_of_four_bit_weights_is_divided_into_whole_blocks_of_constants(batch: int) -> None:
    """Eight words share a constant, and a part of a product is eight words; float32 finds block sizes that look codes up in memory."""
    every = tried(batch, four_bit=True)
    assert all(blocks.k % 8 == 0 and (blocks.k // 8).bit_count() == 1 for blocks in (*every, FOR_CPU["4-bit"]))
    assert any(not blocks.permutes for blocks in every)
    assert len(every) == 6, "as many as the GPU tests hold to the plain path"


def test_a_note_says_how_a_product_is_divided() -> None:
    """Rows and columns at a time, warps, loads ahead, and whether codes are looked up by permutes."""
    assert tried(4, four_bit=True)[0].text == "blocks (32, 32, 4, 4, True)"
