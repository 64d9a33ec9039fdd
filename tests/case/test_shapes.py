"""Named shapes, compared with published parameter counts."""

from __future__ import annotations

import pytest

from hpc_core.case.errors import SpecError
from hpc_core.case.parts import ModelSpec
from hpc_core.case.shapes import MODELS, SHAPES, layers_key, model_named, shrunk

PUBLISHED = {
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "qwen2-7b": 7_615_616_512,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-14b": 14_770_033_664,
    "smollm2-135m": 134_515_008,
    "tiny": 574_336,
}


def test_parameter_counts_are_the_published_ones() -> None:
    """Every shape has its model's published number of parameters."""
    assert {name: named.parameter_count() for name, named in SHAPES.items()} == PUBLISHED


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_shapes_fit_together(name: str) -> None:
    """Query heads are a multiple of key heads, and every linear layer's input fits NF4's blocks of 64."""
    named = SHAPES[name]
    assert named.num_attention_heads % named.num_key_value_heads == 0
    assert named.num_attention_heads * named.head_dim == named.hidden_size
    assert all(columns % 64 == 0 for _, columns in named.linear_shapes().values())


def test_an_unknown_shape_is_refused_with_the_known_ones() -> None:
    """The error lists the known shapes and the other ways to name a model."""
    with pytest.raises(
        SpecError, match=r"Unknown shape 'gpt-5'\. Known shapes: .*llama-2-13b, .*tiny.*weights='folder'"
    ):
        model_named("gpt-5")


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_tiny_version_of_a_row_has_its_parts_and_few_numbers(name: str) -> None:
    """It has the row's keys, at most four layers, and widths that NF4's blocks of 64 fit."""
    row, small = MODELS[name].config, ModelSpec(shape=f"tiny-{name}")
    config = small.configuration()
    assert small.tiny
    assert row.keys() <= config.keys()
    config = config.get("text_config", config)
    assert 2 <= config[layers_key(config)] <= 4
    assert config.get("hidden_size", config.get("n_embd")) % 64 == 0
    assert config["vocab_size"] <= 1024


def test_a_row_with_fewer_layers_is_chosen_by_a_number() -> None:
    """`layers` replaces the number in the configuration, whatever it is called there; too many are refused."""
    assert ModelSpec(shape="gpt2-xl", layers=2).configuration()["n_layer"] == 2
    with pytest.raises(SpecError, match="gpt2-xl has 48; use 1 to 47"):
        ModelSpec(shape="gpt2-xl", layers=48)


def test_a_tiny_model_keeps_every_kind_of_layer() -> None:
    """Lists with an entry for each layer are cut to four entries, and no kind is lost; other lists stay."""
    whole = {
        "num_hidden_layers": 6,
        "layer_types": [*["sliding"] * 5, "full"],
        "no_rope": [1, 1, 1, 0, 1, 1],
        "ids": [7],
    }
    small = shrunk(whole)
    assert small["layer_types"] == ["sliding", "full", "sliding", "full"]
    assert small["no_rope"] == [1, 0, 1, 0]
    assert (small["num_hidden_layers"], small["ids"]) == (4, [7])
