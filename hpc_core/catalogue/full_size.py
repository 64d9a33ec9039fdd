"""Llama-3.2-3B at the settings of the original report, for GPUs."""

from __future__ import annotations

from typing import Any

import msgspec

from hpc_core.case.case import Case, DataSpec, QuantSpec
from hpc_core.catalogue.making import generate, llama_3b
from hpc_core.catalogue.report_variants import fine_tuning_variants, generation_variants

__all__ = ["DEVICE_BOUND", "FULL"]

_GSM8K_TRACE = DataSpec(source="trace", name="gsm8k")

FULL: tuple[Case, ...] = (
    *generation_variants(llama_3b, prompts=2, prompt_length=None, new_tokens=64, extrapolate_to=512, data=_GSM8K_TRACE),
    *fine_tuning_variants(llama_3b, batch=4, length=512, epoch_rows=4000),
)
"""The original report's variants at its settings; 4000 rows an epoch are its 1000 padded steps of 4 x 512."""

_filled: dict[str, Any] = {"batch": 32, "prompts": 2, "prompt_length": 512, "new_tokens": 8}
_half = msgspec.structs.replace(llama_3b, dtype="float16")
DEVICE_BOUND: tuple[Case, ...] = (
    generate(_half, variant="generate-fp16-b32", **_filled),
    generate(_half, variant="generate-nf4-b32", quantization=QuantSpec(kind="nf4", compute_dtype="float32"), **_filled),
    generate(
        _half, variant="generate-nf4-fp16-b32", quantization=QuantSpec(kind="nf4", compute_dtype="float16"), **_filled
    ),
)
"""INT4 against FP16 where the device is what one waits for: a prefill of 32 x 512 tokens. In no suite but `bench/studies/original_report/original_report.py`."""
