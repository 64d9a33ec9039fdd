"""The cases that are predicted without a GPU: the full-size catalogue, other shapes, and a held-out set."""

from __future__ import annotations

from typing import Any

from hpc_core.case.case import Case
from hpc_core.case.parts import DataSpec, ModelSpec, QuantSpec
from hpc_core.catalogue import (
    FULL,
    finetune,
    full,
    generate,
    llama_3b,
    lora,
    qlora,
)

_1b, _8b, _13b = ModelSpec(shape="llama-3.2-1b"), ModelSpec(shape="llama-3.1-8b"), ModelSpec(shape="llama-2-13b")
_qwen = ModelSpec(shape="qwen2.5-1.5b")
_step: dict[str, Any] = {"batch": 4, "length": 512}
_recorded = DataSpec(source="trace", name="gsm8k")
_everywhere = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_nf4 = QuantSpec(kind="nf4", compute_dtype="bfloat16")

HELD_OUT: tuple[Case, ...] = (
    finetune(_1b, lora(rank=32, targets=_everywhere), variant="lora-r32-b8x256", batch=8, length=256),
    finetune(_qwen, full, variant="full-foreach-b2x512", optimizer="adamw-foreach", batch=2, length=512),
    finetune(_1b, full, variant="full-8bit-b2x1024", optimizer="adamw-8bit", batch=2, length=1024),
    finetune(_8b, qlora(), variant="qlora-gc-b2x1024", checkpointing="non-reentrant", batch=2, length=1024),
    finetune(llama_3b, qlora(double_quant=True, dtype="bfloat16"), variant="qlora-dq-b1x2048", batch=1, length=2048),
    finetune(llama_3b, lora(), variant="lora-padded-b8", data=_recorded, padding="longest", batch=8, length=256),
    generate(llama_3b, variant="generate-b8x300", batch=8, prompts=1, prompt_length=300, new_tokens=32),
    generate(_13b, variant="generate-nf4-1000", quantization=_nf4, prompts=1, prompt_length=1000, new_tokens=32),
)
"""Configurations that no rule of the predictor was derived from: their predictions are accepted before anything is measured."""

PREDICTED: tuple[Case, ...] = (
    *FULL,
    finetune(_1b, full, variant="full-bf16", **_step),
    finetune(_qwen, lora(), variant="lora", **_step),
    finetune(_8b, qlora(), variant="qlora-gc", checkpointing="non-reentrant", **_step),
    finetune(_13b, qlora(), variant="qlora-gc", checkpointing="non-reentrant", **_step),
    generate(_8b, variant="generate-bf16", prompts=1, prompt_length=512, new_tokens=32),
    generate(
        llama_3b,
        variant="generate-static-eager",
        cache="static",
        compiled=False,
        prompts=2,
        prompt_length=100,
        new_tokens=64,
    ),
    *HELD_OUT,
)
"""All cases that are predicted without a GPU."""
