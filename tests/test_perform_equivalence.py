"""The reference path: the same weights dequantized, in float32, with eager attention."""

from __future__ import annotations

import pytest
import torch

from hpc_core.build import build
from hpc_core.build.quantization import quantized_layers
from hpc_core.cases import catalogue
from hpc_core.launch.protocol import Job
from hpc_core.perform import perform
from hpc_core.perform.equivalence import TOLERANCES, turn_into_reference


@pytest.mark.parametrize("variant", ["generate-nf4", "generate-nf4-dq", "generate-int8", "qlora"])
def test_the_reference_holds_the_same_weights_dequantized(variant: str) -> None:
    """A quantized layer and its reference agree to what the quantized product rounds, and nothing quantized is left."""
    model = build(catalogue()[f"tiny/{variant}"], torch.device("cpu")).model.eval()
    name, layer = next(iter(quantized_layers(model).items()))
    width = int(layer.in_features)  # type: ignore[arg-type]
    inputs = torch.randn(3, width, dtype=torch.float32)
    seen = layer(inputs.to(torch.float16 if variant == "generate-int8" else torch.float32)).float()

    turn_into_reference(model)
    reference = model.get_submodule(name)(inputs)

    assert not quantized_layers(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert float((seen - reference).norm() / reference.norm()) < TOLERANCES["int8" if "int8" in variant else "bfloat16"]


@pytest.mark.parametrize(
    "variant", ["full-fp32", "full-bf16", "generate-fp16", "generate-int8", "lora-padded", "qlora-prepare"]
)
def test_a_clean_case_is_equivalent_with_room_to_spare(variant: str) -> None:
    """A clean case errs by less than a fifth of its tolerance, so that the fact does not hang on the weather."""
    record = perform(Job(case=catalogue()[f"tiny/{variant}"]), lambda _: None)

    allowed = float(str(record.audit["equivalence"].asked).split()[1])
    assert record.audit["equivalence"].holds
    assert 0 < record.metrics["logits_error"].value < allowed / 5
