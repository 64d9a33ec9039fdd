"""The original report's variants of any model: how it generates, how it is fine-tuned."""

from __future__ import annotations

from typing import Any

import msgspec

from hpc_core.case.case import Case, ModelSpec, QuantSpec
from hpc_core.catalogue.making import (
    finetune,
    full,
    generate,
    lora,
    qlora,
)

__all__ = ["fine_tuning_variants", "generation_variants"]


def generation_variants(model: ModelSpec, **workload: Any) -> list[Case]:
    """FP16 and NF4 as in the report (NF4's compute dtype left at bitsandbytes' float32, said out loud), bf16, NF4 with double quantization, int8."""
    fp16 = msgspec.structs.replace(model, dtype="float16")
    nf4 = QuantSpec(kind="nf4", compute_dtype="float32")
    return [
        generate(fp16, variant="generate-fp16", **workload),
        generate(model, variant="generate-bf16", **workload),
        generate(fp16, variant="generate-nf4", quantization=nf4, **workload),
        generate(
            fp16,
            variant="generate-nf4-dq",
            quantization=QuantSpec(kind="nf4", compute_dtype="float32", double_quant=True),
            **workload,
        ),
        generate(
            fp16, variant="generate-int8", quantization=QuantSpec(kind="int8", compute_dtype="float16"), **workload
        ),
    ]


def fine_tuning_variants(model: ModelSpec, **workload: Any) -> list[Case]:
    """Full, LoRA and QLoRA, each with checkpointing on or off as its id says."""
    base = finetune(model, full, variant="full-bf16", **workload)
    plain = finetune(model, lora(), **workload)
    quantized = finetune(model, qlora(), **workload)
    return [
        base,
        base.vary("full-fp32", model_dtype="float32"),
        plain,
        plain.vary("lora-gc", checkpointing="non-reentrant"),
        plain.vary("lora-bf16", adapter_dtype="bfloat16"),
        quantized,
        quantized.vary("qlora-gc", checkpointing="non-reentrant"),
        quantized.vary("qlora-prepare", prepare=True, checkpointing="as-prepare-leaves-it"),
        quantized.vary("qlora-prepare-nogc", prepare=True),
    ]
