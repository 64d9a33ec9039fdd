"""Each random weight matrix is what its name and the seed determine; any other is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch

from hpc_core.audit.model import value_facts
from hpc_core.builders.assemble import build
from hpc_core.builders.causal_lm import causal_lm, drawn
from hpc_core.case.case import Case
from hpc_core.case.parts import ModelSpec
from hpc_core.catalogue import catalogue, finetune, lora, qlora, tiny
from hpc_core.record.record import Fact
from tests.tiny_cases import TINY_CASES

CPU = torch.device("cpu")
LORA, NF4, INT8 = (catalogue()[f"tiny/{name}"] for name in ("lora", "qlora", "generate-int8"))
AS_DRAWN = "as drawn by seed 0"


def _weights(case: Case, change: Callable[[Any], None] = lambda _: None) -> Fact | None:
    model = build(case, CPU).model
    change(model)
    return value_facts(case, model).facts.get("weights")


def _layer(model: Any, number: int) -> Any:
    return (model.base_model.model if hasattr(model, "peft_config") else model).model.layers[number]


@pytest.mark.parametrize("case", TINY_CASES.values(), ids=lambda case: case.id)
def test_every_case_holds_what_was_drawn(case: Case) -> None:
    """Plain, quantized, prepared or with an adapter, the base weights are those of the seed."""
    assert _weights(case) == Fact(asked=AS_DRAWN, seen=AS_DRAWN)


def test_two_exchanged_rows_are_found() -> None:
    """Frozen weights are compared exactly, so two exchanged rows of a thousand fail the fact."""

    def swap(model: Any) -> None:
        table = model.get_input_embeddings().weight.data
        table[[3, 4]] = table[[4, 3]]

    fact = _weights(LORA, swap)
    assert fact is not None
    assert fact.seen.startswith("model.embed_tokens.weight is off by 0.06")


@pytest.mark.parametrize("case", [NF4, INT8], ids=lambda case: case.id)
def test_exchanged_quantized_layers_are_found(case: Case) -> None:
    """Quantization errs by a tenth at most, another layer's weights by 1.4."""

    def swap(model: Any) -> None:
        first, second = _layer(model, 0).mlp, _layer(model, 1).mlp
        first.up_proj, second.up_proj = second.up_proj, first.up_proj

    fact = _weights(case, swap)
    assert fact is not None
    assert fact.seen.startswith("model.layers.0.mlp.up_proj.weight is off by 1.4")
    assert fact.seen.endswith("1 more with it")


def test_another_seed_is_found() -> None:
    """With another seed every matrix differs."""
    other = msgspec.structs.replace(LORA, model=ModelSpec(shape="tiny", seed=1))
    fact = value_facts(LORA, build(other, CPU).model).facts["weights"]
    assert fact.seen.endswith("21 more with it")


def test_a_nan_weight_is_found() -> None:
    """A NaN is within no tolerance."""

    def spoil(model: Any) -> None:
        _layer(model, 2).self_attn.k_proj.base_layer.weight.data[0, 0] = float("nan")

    fact = _weights(LORA, spoil)
    assert fact is not None
    assert fact.seen == "model.layers.2.self_attn.k_proj.weight is off by nan of its size"


def test_trained_weights_may_move_by_the_learning_rate() -> None:
    """Trained weights may move as far as the learning rate allows; at a high one there is no fact."""
    slow = finetune(tiny, batch=2, length=16, steps=2)
    assert _weights(slow, lambda model: _layer(model, 0).mlp.up_proj.weight.data.add_(2e-4)) == Fact(
        asked=AS_DRAWN, seen=AS_DRAWN
    )
    assert _weights(slow.vary("full-fast", learning_rate=1e-3)) is None


def test_weights_from_a_folder_have_no_seed() -> None:
    """Weights from a folder have no fact `weights`."""
    case = finetune(ModelSpec(weights="folder", path="/nowhere"), lora(), prefix="own")
    assert value_facts(case, torch.nn.Linear(2, 2)).facts == {}


def test_a_parameter_does_not_depend_on_the_rest_of_the_model() -> None:
    """A parameter depends only on its name and the seed, not on the number of layers."""
    whole, short = causal_lm(tiny, CPU), causal_lm(ModelSpec(shape="tiny", layers=1), CPU)
    name = "model.layers.0.mlp.up_proj.weight"
    alone = drawn(name, (256, 128), torch.bfloat16, CPU, 0)
    assert torch.equal(whole.state_dict()[name], alone)
    assert torch.equal(short.state_dict()[name], alone)
    assert not torch.equal(alone, drawn(name, (256, 128), torch.bfloat16, CPU, 1))
    assert float(alone.float().std()) == pytest.approx(0.02, rel=0.02)


def test_double_quantized_weights_pass() -> None:
    """The coarsest quantization passes."""
    coarse = finetune(tiny, qlora(kind="fp4", double_quant=True), batch=2, length=16, steps=2)
    assert _weights(coarse) == Fact(asked=AS_DRAWN, seen=AS_DRAWN)
