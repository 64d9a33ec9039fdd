"""Cases for CPUs: a tiny model for all of the logic in seconds, and true weights of a small one."""

from __future__ import annotations

from typing import Any

import msgspec

from hpc_core.case.case import Case, DataSpec, QuantSpec
from hpc_core.catalogue.making import (
    finetune,
    generate,
    lora,
    qlora,
    smollm2,
    tiny,
)
from hpc_core.catalogue.report_variants import fine_tuning_variants, generation_variants

__all__ = ["SMALL", "SOAK_TRACE", "TINY", "TINY_TRACE"]

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
"""The same variants on a model of 0.6 million parameters, for CPUs and for CI: all of the logic in seconds."""

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
"""Few rows, so that the same batches come again and their loss can be seen to fall. On a busy CPU they take minutes."""

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
"""SmolLM2-135M-Instruct with its true weights: answers that can be read, a loss that falls."""
