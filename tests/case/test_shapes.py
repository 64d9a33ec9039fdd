"""Named shapes, compared with published parameter counts."""

from __future__ import annotations

import pytest

from hpc_core.case.errors import SpecError
from hpc_core.case.shapes import SHAPES, shape

PUBLISHED = {
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "llama-2-13b": 13_015_864_320,
    "qwen2.5-1.5b": 1_543_714_304,
    "smollm2-135m": 134_515_008,
    "tiny": 574_336,
}


def test_parameter_counts_are_the_published_ones() -> None:
    """Every shape has its model's published number of parameters."""
    assert {name: named.parameter_count() for name, named in SHAPES.items()} == PUBLISHED


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_shapes_fit_together(name: str) -> None:
    """Query heads are a multiple of key heads, and every linear layer's input fits NF4's blocks of 64."""
    named = shape(name)
    assert named.num_attention_heads % named.num_key_value_heads == 0
    assert named.num_attention_heads * named.head_dim == named.hidden_size
    assert all(columns % 64 == 0 for _, columns in named.linear_shapes().values())


def test_an_unknown_shape_is_refused_with_the_known_ones() -> None:
    """The error lists the known shapes and the other ways to name a model."""
    with pytest.raises(SpecError, match=r"Unknown shape 'gpt-5'\. Known shapes: llama-2-13b, .*tiny.*weights='folder'"):
        shape("gpt-5")
