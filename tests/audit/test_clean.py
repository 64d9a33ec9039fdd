"""The audit of correct runs: every fact is there and holds, in every variant."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hpc_core.audit.model import linear_layers, quantized_bytes
from hpc_core.builders.assemble import build
from hpc_core.case.case import Case
from hpc_core.case.parts import DataSpec, QuantSpec
from hpc_core.case.workloads import FinetuneSpec
from hpc_core.catalogue import finetune, generate, lora, qlora, tiny
from tests.tiny_cases import TINY_CASES, measured, tiny_record

WEIGHTS = {
    "quantized_layers", "embedding_dtype", "norm_dtype", "head_dtype", "weight_layout", "attention",
    "attention_kernel", "weights", "modules_own",
}  # fmt: skip
QUANTIZED = {"quantization", "quantized_bytes"}
TRAINING = {
    "checkpointing", "optimizer", "optimizer_state_dtype", "trainable_parameters", "trainable_names", "training_mode", "autocast",
    "gradients", "trained_tokens", "padded_tokens", "batch", "losses_finite", "loss", "loss_scale",
}  # fmt: skip
GENERATION = {
    "cache", "cache_length", "forwards", "new_tokens", "training_mode", "autograd", "autocast", "prompt_tokens",
    "prefill",
}  # fmt: skip


def _expected_facts(case: Case) -> set[str]:
    facts = WEIGHTS | (TRAINING if isinstance(case.workload, FinetuneSpec) else GENERATION)
    if case.quantization is not None:
        facts = facts | QUANTIZED
        if case.quantization.kind != "int8":
            facts = facts | {"compute_dtype", "double_quantization"}
    if case.adapter is not None:
        facts = facts | {"adapter_dtype", "dropout"}
    if isinstance(case.workload, FinetuneSpec) and case.workload.checkpointing in ("reentrant", "non-reentrant"):
        facts = facts | {"checkpointing_kind"}
    return facts


@pytest.mark.parametrize("case_id", TINY_CASES)
def test_a_tiny_case_has_all_its_facts(case_id: str) -> None:
    """No fact is missing or undetermined; tests/worker/test_cases.py checks that all hold."""
    record = tiny_record(case_id)
    assert _expected_facts(TINY_CASES[case_id]) - set(record.audit) == set()
    assert [note for note in record.circumstances.notes if note.startswith("audit")] == []


_short: dict[str, Any] = {"batch": 2, "length": 16, "steps": 2}
_answer: dict[str, Any] = {"prompts": 1, "prompt_length": 9, "new_tokens": 4}
_int8 = QuantSpec(kind="int8", compute_dtype="float16")
_eager = finetune(tiny, lora(), variant="lora", **_short).vary("lora-eager", attention="eager")
VARIANTS = [
    finetune(tiny, lora(), variant="lora-reentrant", checkpointing="reentrant", **_short),
    finetune(tiny, lora(dropout=0.0), variant="lora-sober", **_short),
    finetune(tiny, lora(targets=("up_proj", "lm_head")), variant="lora-head", **_short),
    finetune(tiny, lora(dtype="float16"), variant="lora-fp16", **_short),
    finetune(tiny, lora(), variant="lora-foreach", optimizer="adamw-foreach", **_short),
    finetune(tiny, variant="full-autocast", precision="autocast-bf16", **_short).vary(
        "full-autocast-fp32", model_dtype="float32"
    ),
    finetune(tiny, lora(), variant="lora-autocast", precision="autocast-bf16", **_short),
    finetune(tiny, qlora(kind="fp4", double_quant=True), variant="qlora-fp4", **_short),
    finetune(tiny, qlora(kind="int8", compute_dtype="float16"), variant="qlora-int8", prepare=True, **_short),
    finetune(tiny, lora(), variant="lora-short", batch=1, length=2, steps=2),
    _eager,
    generate(tiny, variant="generate-static", cache="static", **_answer),
    generate(tiny, variant="generate-eager", **_answer).vary("generate-eager-2", attention="eager"),
    generate(
        tiny,
        variant="generate-padded",
        batch=2,
        prompts=2,
        prompt_length=None,
        new_tokens=3,
        data=DataSpec(source="trace", name="gsm8k"),
    ),
    generate(
        tiny,
        variant="generate-head",
        quantization=QuantSpec(kind="nf4", compute_dtype="bfloat16", skip_modules=("down_proj",)),
        **_answer,
    ),
]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.nightly
@pytest.mark.parametrize("case", VARIANTS, ids=lambda case: case.id)
def test_a_rarer_variant_is_no_false_alarm(case: Case) -> None:
    """Every fact also holds for caches, optimizers, kinds of checkpointing, attention and targets that no catalogue case uses."""
    record, _ = measured(case)
    assert record.reasons == ()
    assert [note for note in record.circumstances.notes if note.startswith("audit")] == []


def test_without_a_cache_there_is_no_cache_length() -> None:
    """Without a KV cache the fact `cache` is off and there is no `cache_length`."""
    record, _ = measured(generate(tiny, variant="generate-uncached", cache="off", **_answer))
    assert record.audit["cache"].seen == "off"
    assert "cache_length" not in record.audit


def test_the_attention_kernel_is_recorded() -> None:
    """The record names the fused attention kernel that ran."""
    assert tiny_record("tiny/lora").audit["attention_kernel"].seen == ["flash_attention_for_cpu"]


def test_the_checkpointing_that_prepare_chose_is_noted() -> None:
    """If a case leaves checkpointing to peft's preparation, a note says which kind ran."""
    assert "prepare left checkpointing on, reentrant" in tiny_record("tiny/qlora-prepare").circumstances.notes


@pytest.mark.parametrize(
    "spec",
    [QuantSpec(kind="nf4", compute_dtype="float32", double_quant=nested) for nested in (False, True)] + [_int8],
    ids=["nf4", "nf4-dq", "int8"],
)
def test_the_closed_form_of_a_layers_bytes_adds_up(spec: QuantSpec) -> None:
    """A quantized layer's bytes are its packed weights, constants and tables."""
    weights, rows = 256 * 128, 256
    blocks = weights // 64
    by_hand = {
        ("int8", False): weights + 4 * rows,
        ("nf4", False): weights // 2 + 64 + 4 * blocks,
        ("nf4", True): weights // 2 + 64 + blocks + 2 * 4 + 4 + 1024,
    }
    assert quantized_bytes(spec, 128, 256) == by_hand[spec.kind, spec.double_quant]


def test_linear_layers_keep_their_names_under_an_adapter() -> None:
    """A wrapped layer is listed once, under its own name, without LoRA's linear layers."""
    plain = build(TINY_CASES["tiny/full-bf16"], torch.device("cpu")).model
    wrapped = build(TINY_CASES["tiny/qlora"], torch.device("cpu")).model
    prefix = "base_model.model."
    assert [prefix + name for name in linear_layers(plain)] == list(linear_layers(wrapped))
    assert len(linear_layers(plain)) == 3 * 7 + 1
