"""Our kernels read the constants of 4-bit matrices in place, as bitsandbytes decodes them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpc_core.case.errors import BuildError, library
from hpc_core.engines.kernels.four_bit_format import constants_of
from hpc_core.engines.kernels.layout import pointer_offsets


def _states(*rows: int, nested: bool) -> list[Any]:
    functional = library("bitsandbytes", "4-bit matrices").functional
    torch.manual_seed(sum(rows))
    return [
        functional.quantize_4bit(torch.randn(count, 64), quant_type="nf4", compress_statistics=nested)[1]
        for count in rows
    ]


@pytest.mark.parametrize("rows", [(300,), (512, 16, 16), (700, 300)])
def test_constants_equal_those_that_bitsandbytes_decodes(rows: tuple[int, ...]) -> None:
    """Code, outer constant and offset give each matrix's constants, for one and for several outer blocks."""
    functional = library("bitsandbytes", "4-bit matrices").functional
    states = _states(*rows, nested=True)
    constants = constants_of(states)
    assert constants.nested
    for index, state in enumerate(states):
        blocks = torch.arange(len(state.absmax))
        assert constants.code is not None
        assert constants.offsets is not None
        decoded = constants.code[constants.each[index].int()] * constants.outer[index][blocks >> 8]
        expected = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        torch.testing.assert_close(decoded + constants.offsets[index], expected)


@pytest.mark.parametrize("nested", [False, True])
def test_nothing_but_the_offsets_is_copied(nested: bool) -> None:
    """A launch reads bitsandbytes' own tensors, the second and third by their offset from the first."""
    states = _states(512, 64, 64, nested=nested)
    constants = constants_of(states)
    assert [each.data_ptr() for each in constants.each] == [state.absmax.data_ptr() for state in states]
    offsets = constants.offsets_of_pointers()
    width = constants.each[0].element_size()
    assert constants.each[0].data_ptr() + offsets["absmax_third"] * width == states[2].absmax.data_ptr()
    if nested:
        assert constants.outer[0].data_ptr() + 4 * offsets["outer_second"] == states[1].state2.absmax.data_ptr()
        assert constants.offsets is not None
        assert constants.offsets.tolist() == [float(state.offset) for state in states]
    else:
        assert constants.offsets is None


def test_constants_that_one_launch_cannot_read_are_refused() -> None:
    """Matrices that differ in double quantization, block size or codes are refused."""
    plain, nested = _states(64, nested=False), _states(64, nested=True)
    with pytest.raises(BuildError, match=r"same double_quant, or say kernels='torch'"):
        constants_of([*plain, *nested])
    state = nested[0]
    wider = SimpleNamespace(**vars(state) | {"state2": SimpleNamespace(**vars(state.state2) | {"blocksize": 512})})
    with pytest.raises(BuildError, match=r"blocks of 256, these are in blocks of 512"):
        constants_of([wider])
    other = SimpleNamespace(**vars(state) | {"state2": SimpleNamespace(**vars(state.state2) | {"code": state.code})})
    with pytest.raises(BuildError, match="different codes"):
        constants_of([state, other])


@given(st.lists(st.integers(1, 50), min_size=1, max_size=3))
def test_pointer_offsets_lead_from_the_first_tensor_to_the_others(sizes: list[int]) -> None:
    """Offsets count elements, and are 0 for missing tensors."""
    tensors = [torch.zeros(size) for size in sizes]
    offsets = pointer_offsets(tensors)
    for tensor, elements in zip(tensors[1:], offsets, strict=False):
        assert tensors[0].data_ptr() + 4 * elements == tensor.data_ptr()
    assert offsets[len(tensors) - 1 :] == (0, 0)[len(tensors) - 1 :]
