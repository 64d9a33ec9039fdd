"""The reference path runs the same weights, dequantized, in float32 with eager attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hpc_core.audit import reference
from hpc_core.audit.reference import (
    TOLERANCES,
    Given,
    coarsest,
    compare_with_reference,
    full_float32,
    reference_bytes,
    turn_into_reference,
)
from hpc_core.builders.assemble import build
from hpc_core.builders.quantization import quantized_layers
from hpc_core.case.case import Case
from hpc_core.case.parts import ModelSpec
from hpc_core.catalogue import catalogue, finetune, lora
from hpc_core.catalogue.architectures import lora_step
from hpc_core.instruments.owners import owned_bytes, weight_tensors
from hpc_core.record.findings import Findings
from tests.tiny_cases import measured, tiny_record


def _built(variant: str) -> tuple[Case, Any]:
    case = catalogue()[f"tiny/{variant}"]
    return case, build(case, torch.device("cpu")).model


def _compared(case: Case, model: torch.nn.Module, given: Given) -> Findings:
    return compare_with_reference(case, model, given, restore=lambda _: None)


def _generated(model: Any) -> Given:
    """Two prompts of 12 tokens, the second padded on the left, with six generated tokens each."""
    ids, mask = torch.randint(3, 400, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    answers = out[:, 12:]
    return Given(out[:, :-1], torch.cat([mask, torch.ones_like(answers[:, :-1])], dim=1), answers=answers)


@pytest.mark.parametrize("variant", ["generate-nf4", "generate-nf4-dq", "generate-int8", "qlora"])
def test_the_reference_holds_the_same_weights_dequantized(variant: str) -> None:
    """A quantized layer and its reference agree up to rounding, and no quantized layer is left."""
    model = build(catalogue()[f"tiny/{variant}"], torch.device("cpu")).model.eval()
    name, layer = next(iter(quantized_layers(model).items()))
    width = int(layer.in_features)  # type: ignore[arg-type]
    inputs = torch.randn(3, width, dtype=torch.float32)
    output = layer(inputs.to(torch.float16 if variant == "generate-int8" else torch.float32)).float()

    turn_into_reference(model)
    expected = model.get_submodule(name)(inputs)

    assert not quantized_layers(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert float((output - expected).norm() / expected.norm()) < TOLERANCES["int8" if "int8" in variant else "bfloat16"]


@pytest.mark.parametrize(
    "variant", ["full-fp32", "full-bf16", "generate-fp16", "generate-int8", "lora-padded", "qlora-prepare"]
)
def test_a_clean_case_is_equivalent_with_room_to_spare(variant: str) -> None:
    """A correct case's error is below a fifth of its tolerance."""
    record = tiny_record(f"tiny/{variant}")

    allowed = float(str(record.audit["equivalence"].asked).split()[1])
    assert record.audit["equivalence"].holds
    assert 0 < record.metrics["logits_error"].value < allowed / 5
    if "generate" in variant:
        assert record.audit["greedy_tokens"].holds
        assert record.metrics["greedy_agreement"].value > 0.8
    else:
        assert record.audit["reference_loss"].holds
        losses = [record.metrics[name].value for name in ("loss_checked", "loss_reference")]
        assert losses[0] == pytest.approx(losses[1], rel=allowed / 5)


@pytest.mark.parametrize(
    ("variant", "times", "holds"),
    [("full-bf16", 1.5, True), ("full-bf16", 3.0, False), ("generate-fp16", 1.5, True), ("full-fp32", 1.5, False)],
)
def test_half_precision_may_err_twice_as_much_as_plain_arithmetic(
    variant: str, times: float, holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above the table's tolerance a half-precision error may be twice that of plain arithmetic in the same dtype.

    The test lowers the table below this model's error, and multiplies the error of the case's own path by `times`.
    """
    case, model = _built(variant)
    ids = torch.randint(3, 400, (2, 24))
    given = Given(ids, None)
    error = _compared(*_built(variant), given).metrics["logits_error"].value
    monkeypatch.setitem(TOLERANCES, coarsest(case), error * times / 3.5)
    monkeypatch.setattr(reference, "_error", _times_for_the_first(reference._error, times))

    findings = _compared(case, model, given)

    assert findings.facts["equivalence"].holds is holds
    half_precision = "fp32" not in variant
    assert [note.startswith("equivalence: the plain path errs by") for note in findings.notes] == [
        True
    ] * half_precision


def _times_for_the_first(error: Any, times: float) -> Any:
    factors = iter([times])
    return lambda *given: error(*given) * next(factors, 1.0)


def test_an_adapter_is_compared_without_dropout() -> None:
    """A LoRA model with dropout is compared without it."""
    method = lora(dropout=0.5)
    model = ModelSpec(shape="tiny", dtype="float32")
    case = finetune(model, method, variant="lora-dropout", batch=2, length=32, steps=3, learning_rate=1e-2)
    record, _ = measured(case)
    assert record.status == "ok", record.reasons
    assert record.metrics["logits_error"].value < 1e-5
    assert record.metrics["loss_checked"].value == pytest.approx(record.metrics["loss_reference"].value, rel=1e-5)


def test_the_answers_of_generate_are_those_of_the_reference() -> None:
    """With a KV cache and left padding, `generate` chooses the reference's tokens."""
    case, model = _built("generate-fp16")
    findings = _compared(case, model, _generated(model))
    assert findings.facts["greedy_tokens"].holds
    assert findings.metrics["greedy_agreement"].value > 0.8


def test_a_token_that_is_not_the_references_is_named() -> None:
    """A token that differs from the reference's is reported with its place and both ids."""
    case, model = _built("generate-fp16")
    given = _generated(model)
    assert given.answers is not None
    changed = given.answers.clone()
    changed[1, 5] = (changed[1, 5] + 100) % 400  # the last token, on which no other depends

    findings = _compared(case, model, Given(given.ids, given.mask, answers=changed))

    fact = findings.facts["greedy_tokens"]
    assert not fact.holds
    assert fact.seen.startswith("1 of 12 are not the reference's; first token 5 of row 1: ")
    assert findings.facts["equivalence"].holds  # the logits are right


def test_the_memory_of_the_reference_is_estimated_exactly() -> None:
    """The estimate is the growth of the weights, exactly, plus the largest tensor, which exists twice during the conversion."""
    for variant in ("generate-nf4-dq", "generate-int8", "full-bf16", "full-fp32", "qlora"):
        model: Any = build(catalogue()[f"tiny/{variant}"], torch.device("cpu")).model
        before = sum(owned_bytes(part) for part in weight_tensors(model).values())
        estimate = reference_bytes(model, 0, 0)
        largest = 4 * max(parameter.numel() for parameter in model.parameters())

        turn_into_reference(model)

        after = sum(owned_bytes(part) for part in weight_tensors(model).values())
        assert estimate == after - before + largest
    one, two = reference_bytes(model, 1, 64), reference_bytes(model, 2, 64)
    assert two > one > estimate


@pytest.mark.parametrize("name", ["mamba2-2.7b", "mixtral-8x7b", "gpt2-xl"])
def test_the_memory_of_any_architectures_reference_can_be_estimated(name: str) -> None:
    """Also of a model without attention, whose configuration has no heads."""
    model = build(lora_step(name, tiny=True), torch.device("cpu")).model
    assert reference_bytes(model, 2, 64) > reference_bytes(model, 1, 64) > 0


def test_a_reference_that_does_not_fit_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """If memory is short nothing is compared, and a note gives both sizes."""
    monkeypatch.setattr(reference, "room_bytes", lambda _: 1000)

    findings = _compared(*_built("generate-bf16"), Given(torch.ones(2, 8, dtype=torch.long), None))

    assert findings.facts == {}
    assert [note.partition("needs ")[0] for note in findings.notes] == [
        "equivalence: not checked, the float32 reference "
    ]
    assert findings.notes[0].endswith("MiB more and 1,000 B are left")


def test_the_reference_computes_without_tf32() -> None:
    """TF32 that the code under test enabled is off for the reference, and on again afterwards."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with full_float32():
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
