"""Products of a batch with 4-bit weights that are dequantized whole: the layouts, and that they are the plain path's products to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from hpc_core.build import build
from hpc_core.cases import generate, tiny
from hpc_core.engine.block_sizes import WHOLE, tried
from hpc_core.engine.whole_weights import multiply_whole, values_by_eights, values_in_order
from hpc_core.spec import QuantSpec

CPU = torch.device("cpu")
_BATCH = 3


@pytest.fixture(scope="module", params=[False, True], ids=["nf4", "nf4-dq"])
def layer(request: pytest.FixtureRequest) -> Any:
    quantization = QuantSpec(kind="nf4", compute_dtype="bfloat16", double_quant=request.param)
    model: Any = build(generate(tiny, quantization=quantization), CPU).model
    return model.model.layers[1]


def _drawn(columns: int, seed: int) -> torch.Tensor:
    return torch.randn(_BATCH, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()


@given(rows=st.integers(1, 4), eights=st.integers(1, 9), seed=st.integers(0, 99))
def test_an_order_by_eights_is_undone(rows: int, eights: int, seed: int) -> None:
    """What is stored by eights holds every value once, and in order again it is what it was."""
    values = torch.randperm(rows * eights * 8, generator=torch.Generator().manual_seed(seed)).view(rows, -1)
    stored = values_by_eights(values)
    assert torch.equal(values_in_order(stored), values)
    assert torch.equal(stored.sort(dim=-1).values, values.sort(dim=-1).values)


def test_the_first_two_of_each_eight_come_first() -> None:
    """As the kernels read them: eight values of two eights, in pairs."""
    assert values_by_eights(torch.arange(16)).tolist() == [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]


@pytest.mark.parametrize("by_eights", [(False, False), (True, False), (True, True)])
def test_matrices_side_by_side_are_the_layers_own_products(layer: Any, by_eights: tuple[bool, bool]) -> None:
    """Queries, keys and values of a batch, whatever the order of input and output, are what bitsandbytes' layers give."""
    parts = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
    x = _drawn(parts[0].in_features, 1)
    wanted = torch.cat([part(x) for part in parts], dim=-1)
    out = torch.empty_like(wanted)
    given_x = values_by_eights(x) if by_eights[0] else x
    weights = [part.weight for part in parts]
    multiply_whole(given_x, out, weights, [], gated=False, by_eights=by_eights, residual=None)
    assert torch.equal(values_in_order(out) if by_eights[1] else out, wanted)


def test_gate_and_up_are_one_product_and_a_residual_is_added(layer: Any) -> None:
    """SiLU(gate) · up, then the way back plus what went around: the MLP of the plain path."""
    mlp, order = layer.mlp, (True, True)
    x, around = _drawn(mlp.gate_proj.in_features, 2), _drawn(mlp.down_proj.out_features, 3)
    inner = functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
    middle, out = torch.empty_like(inner), torch.empty_like(around)
    weights = [mlp.gate_proj.weight, mlp.up_proj.weight]
    multiply_whole(values_by_eights(x), middle, weights, [], gated=True, by_eights=order, residual=None)
    assert torch.equal(values_in_order(middle), inner)
    kept = values_by_eights(around)
    multiply_whole(middle, out, [mlp.down_proj.weight], [], gated=False, by_eights=order, residual=kept)
    assert torch.equal(values_in_order(out), mlp.down_proj(inner) + around)


def test_biases_belong_to_their_matrices(layer: Any) -> None:
    """As Qwen's queries, keys and values have them: parameters that want a gradient, which nothing here keeps."""
    parts = [layer.self_attn.k_proj, layer.self_attn.v_proj]
    biases = [torch.nn.Parameter(_drawn(part.out_features, seed)[0]) for seed, part in enumerate(parts)]
    x = _drawn(parts[0].in_features, 4)
    out = torch.empty(_BATCH, sum(part.out_features for part in parts), dtype=x.dtype)
    weights = [part.weight for part in parts]
    multiply_whole(x, out, weights, biases, gated=False, by_eights=(False, False), residual=None)
    whole = torch.cat([part(x) + bias for part, bias in zip(parts, biases, strict=True)], dim=-1)
    torch.testing.assert_close(out, whole.detach(), rtol=2**-7, atol=2**-7)
    assert not out.requires_grad


@given(batch=st.integers(1, 32), four_bit=st.booleans())
def test_only_a_wide_batch_of_four_bit_weights_is_dequantized_whole(batch: int, four_bit: bool) -> None:
    """A few rows read each code once: there writing the weights out can only cost. By the batch alone, so that kernels are the same each time."""
    wide = four_bit and batch > 16
    assert [each.whole for each in tried(batch, four_bit=four_bit)] == (
        [True] if wide else [False] * len(tried(batch, four_bit=four_bit))
    )


def test_a_note_says_how_a_product_is_cut() -> None:
    """Block sizes as they are, or that there are none."""
    assert WHOLE.said == "whole dequantized weights"
    assert tried(4, four_bit=True)[0].said == "blocks (16, 64, 4, 2, False)"
