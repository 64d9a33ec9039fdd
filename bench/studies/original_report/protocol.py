"""The whole protocol of the original report as cases: 500 questions per generation method, two epochs per training method.

Values only: no torch, no I/O. The catalogue's cases measure the same variants in minutes; these take hours.
"""

from __future__ import annotations

from typing import Any

import msgspec

from hpc_core.case.case import Case
from hpc_core.case.parts import DataSpec, ModelSpec, QuantSpec
from hpc_core.case.workloads import FinetuneSpec
from hpc_core.catalogue import (
    finetune,
    full,
    generate,
    lora,
    qlora,
)

__all__ = ["protocol"]

_LLAMA = ModelSpec(shape="llama-3.2-3b")
_TINY = ModelSpec(shape="tiny")
_HOURS = 3600.0
_QUESTIONS = 500
_ROWS = 4000
_EPOCHS = 2


def protocol(weights: ModelSpec | None = None, *, short: bool = False) -> tuple[Case, ...]:
    """Return the report's seven rows: generation in FP16 and NF4; full, LoRA and QLoRA, the latter two also with checkpointing.

    Args:
        weights: true ones, which bring the data sets GSM8K and WikiText-2 with them; None takes random weights of
            Llama-3.2-3B's shape and the recorded lengths of both data sets.
        short: the same rows on a model of 0.6 million parameters, with a handful of questions and steps.
    """
    if short:
        return _cases(
            _TINY, "tiny", source="trace", questions=3, new_tokens=8, rows=16, batch=2, length=64, timeout_s=300.0
        )
    return _cases(
        weights or _LLAMA,
        "llama-3.2-3b" if weights is None else "own",
        source="trace" if weights is None else "hub",
        questions=_QUESTIONS,
        new_tokens=512,
        rows=_ROWS,
        batch=4,
        length=512,
        timeout_s=24 * _HOURS,
    )


def _cases(
    model: ModelSpec,
    prefix: str,
    *,
    source: str,
    questions: int,
    new_tokens: int,
    rows: int,
    batch: int,
    length: int,
    timeout_s: float,
) -> tuple[Case, ...]:
    scale = "tiny" if prefix == "tiny" else "full"
    named: dict[str, Any] = {"prefix": prefix, "scale": scale, "timeout_s": timeout_s}
    fp16 = msgspec.structs.replace(model, dtype="float16")
    prompts = msgspec.convert({"source": source, "name": "gsm8k", "rows": questions}, DataSpec)
    answers: dict[str, Any] = {
        "prompts": questions,
        "prompt_length": None,
        "new_tokens": new_tokens,
        "data": prompts,
    } | named
    texts = msgspec.convert({"source": source, "name": "wikitext2", "rows": rows}, DataSpec)
    steps = _EPOCHS * (rows // batch)
    training: dict[str, Any] = {
        "batch": batch,
        "length": length,
        "padding": "max_length",
        "steps": steps,
        "data": texts,
    } | named
    plain = finetune(model, lora(), variant="original-lora", **training)
    prepared = finetune(
        model, qlora(), variant="original-qlora-prepare", prepare=True, checkpointing="as-prepare-leaves-it", **training
    )
    assert isinstance(prepared.workload, FinetuneSpec)
    return (
        generate(fp16, variant="original-fp16", **answers),
        generate(fp16, variant="original-nf4", quantization=QuantSpec(kind="nf4", compute_dtype="float32"), **answers),
        finetune(model, full, variant="original-full", **training),
        plain,
        plain.vary("original-lora-gc", checkpointing="non-reentrant"),
        prepared,
        prepared.vary("original-qlora-prepare-gc", checkpointing="non-reentrant"),
    )
