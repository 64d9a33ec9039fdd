"""Cases of the stock libraries: the original report's variants at full size, on a tiny model, and on real weights of a small one."""

from __future__ import annotations

from typing import Any

import msgspec

from hpc_core.case.case import Case
from hpc_core.case.parts import DataSpec, ModelSpec, QuantSpec
from hpc_core.case.workloads import GenerateSpec
from hpc_core.catalogue.shorthand import (
    finetune,
    full,
    generate,
    llama_3b,
    lora,
    qlora,
    smollm2,
    tiny,
)


def generation_variants(model: ModelSpec, **workload: Any) -> list[Case]:
    """Return generation in fp16, bf16, NF4, NF4 with double quantization, and int8. NF4 computes in float32, bitsandbytes' default, as in the report."""
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
    """Return full fine-tuning, LoRA and QLoRA, with checkpointing on or off as the id says."""
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


_GSM8K_TRACE = DataSpec(source="trace", name="gsm8k")

FULL: tuple[Case, ...] = (
    *generation_variants(llama_3b, prompts=2, prompt_length=None, new_tokens=64, extrapolate_to=512, data=_GSM8K_TRACE),
    *fine_tuning_variants(llama_3b, batch=4, length=512, epoch_rows=4000),
)
"""The original report's variants at its settings. Its epoch of 1000 padded steps of 4 x 512 has 4000 rows."""

_filled: dict[str, Any] = {"batch": 32, "prompts": 2, "prompt_length": 512, "new_tokens": 8}
_half = msgspec.structs.replace(llama_3b, dtype="float16")
DEVICE_BOUND: tuple[Case, ...] = (
    generate(_half, variant="generate-fp16-b32", **_filled),
    generate(_half, variant="generate-nf4-b32", quantization=QuantSpec(kind="nf4", compute_dtype="float32"), **_filled),
    generate(
        _half, variant="generate-nf4-fp16-b32", quantization=QuantSpec(kind="nf4", compute_dtype="float16"), **_filled
    ),
)
"""4-bit against FP16 in a device-bound case, a prefill of 32 x 512 tokens. Only `bench/studies/original_report/` runs them."""


TINY_TRACE = DataSpec(source="trace", name="wikitext2", rows=64)
SOAK_TRACE = DataSpec(source="trace", name="wikitext2", rows=1000)
_tiny_lora = finetune(tiny, lora(), batch=2, length=64, steps=5)

TINY: tuple[Case, ...] = (
    *generation_variants(tiny, prompts=2, prompt_length=24, new_tokens=8, timeout_s=120),
    *fine_tuning_variants(tiny, batch=2, length=64, steps=5, timeout_s=120),
    _tiny_lora.vary("lora-padded", data=TINY_TRACE, padding="longest"),
    _tiny_lora.vary("lora-max-length", data=TINY_TRACE, padding="max_length"),
    _tiny_lora.vary("lora-packed", data=TINY_TRACE, packing=True),
    _tiny_lora.vary("lora-8bit", optimizer="adamw-8bit", rank=32),
    _tiny_lora.vary("lora-tuned", dropout=0.0, engine="tuned", loss="chunked", loss_chunk=64, fusion="blocks"),
    _tiny_lora.vary("lora-soak", data=SOAK_TRACE, padding="longest", length=128, batch=2, steps=200),
)
"""The same variants on a model of 0.6 million parameters, for CPUs and CI: all of the logic in seconds."""

_PROBLEMS = DataSpec(source="embedded", name="problems")
_PARAGRAPHS = DataSpec(source="embedded", name="paragraphs", rows=60)
_small_answers: dict[str, Any] = {
    "prefix": "smollm2-135m",
    "scale": "small",
    "prompts": 3,
    "prompt_length": None,
    "new_tokens": 48,
    "timeout_s": 900.0,
}
_small_rows: dict[str, Any] = {
    "prefix": "smollm2-135m",
    "scale": "small",
    "batch": 4,
    "length": 128,
    "steps": 6,
    "packing": True,
    "learning_rate": 1e-3,
    "timeout_s": 900.0,
}
"""Few rows, so that batches repeat and their loss falls visibly. On a busy CPU these cases take minutes."""

SMALL: tuple[Case, ...] = (
    generate(smollm2, variant="generate", data=_PROBLEMS, **_small_answers),
    generate(smollm2, variant="generate-gsm8k", data=DataSpec(source="hub", name="gsm8k"), **_small_answers),
    *(
        generate(
            smollm2,
            variant=f"generate-{kind}",
            quantization=msgspec.convert({"kind": kind, "compute_dtype": computed}, QuantSpec),
            data=_PROBLEMS,
            **_small_answers,
        )
        for kind, computed in (("nf4", "float32"), ("fp4", "float32"), ("int8", "float16"))
    ),
    finetune(smollm2, lora(), data=_PARAGRAPHS, **_small_rows),
    finetune(
        smollm2,
        lora(),
        variant="lora-wikitext2",
        data=DataSpec(source="hub", name="wikitext2", rows=30),
        **_small_rows,
    ),
    finetune(smollm2, qlora(compute_dtype="float32"), data=_PARAGRAPHS, **_small_rows),
)
"""SmolLM2-135M-Instruct with its real weights: readable answers and a falling loss."""


def _short(case: Case) -> Case:
    """Return the case `<id>-4-layers`: layers of full width, a few steps."""
    less = {"new_tokens": 8} if isinstance(case.workload, GenerateSpec) else {"steps": 4}
    return case.vary(f"{case.id.rpartition('/')[2]}-4-layers", layers=4, timeout_s=180, **less)


_lora = next(case for case in FULL if case.id.endswith("/lora"))
_short_lora = _short(_lora)

TRIAL: tuple[Case, ...] = (
    *(_short(case) for case in FULL),
    _short_lora.vary("lora-8bit-4-layers", optimizer="adamw-8bit", rank=32),
    _short_lora.vary("lora-padded-4-layers", data=TINY_TRACE, padding="longest", epoch_rows=None),
    _short_lora.vary("lora-packed-4-layers", data=SOAK_TRACE, packing=True, epoch_rows=None),
    _short_lora.vary("lora-soak-4-layers", data=SOAK_TRACE, padding="longest", length=128, steps=120, epoch_rows=None),
)
"""Shortened full-size cases, for testing faults on a GPU. Not in ALL: a clean run in the same session is their baseline."""

WHOLE: tuple[Case, ...] = (*FULL, _lora.vary("lora-8bit", optimizer="adamw-8bit", rank=32))
"""Full-size cases, for testing faults on predictions."""
