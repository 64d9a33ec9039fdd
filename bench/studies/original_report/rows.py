"""The original report's rows as records, checked against bounds; `python -m bench.studies.original_report page` prints them.

Source: the course report this project grew from (Llama-3.2-3B-Instruct on one RTX 5090, torch 2.6, transformers 4.57).
Its "GB" are bytes / 1024**3. Where it leaves something open, each reading is a record of its own.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from hpc_core.bounds.check import judged
from hpc_core.case.case import Case
from hpc_core.case.lengths import recorded_lengths
from hpc_core.case.limits import GiB
from hpc_core.case.parts import DataSpec, ModelSpec, QuantSpec
from hpc_core.case.workloads import FinetuneSpec
from hpc_core.catalogue import (
    finetune,
    full,
    generate,
    llama_3b,
    lora,
    qlora,
)
from hpc_core.record.record import (
    Circumstances,
    Machine,
    Metric,
    Record,
    record_from_json,
)

__all__ = ["REAL_TOKENS", "report_records"]

_ROWS, _BATCH, _LENGTH, _QUESTIONS = 4000, 4, 512, 500
REAL_TOKENS = sum(min(length, _LENGTH) for length in recorded_lengths("wikitext2")[:_ROWS])
"""Tokens of its 4000 rows without padding, including each row's BOS."""

_MACHINE = Machine(key="nvidia-geforce-rtx-5090-32gib", name="NVIDIA GeForce RTX 5090", memory_bytes=32607 * 2**20)
"""NVML reports 32,607 MiB for this GPU."""
_OURS = Path("baselines", "nvidia-h100-80gb-hbm3-80gib", "llama-3.2-3b")


def report_records() -> dict[str, Record]:
    """Return the report's seven rows and other readings of them, by name; impossible ones are INVALID with a reason."""
    fp16 = ModelSpec(shape="llama-3.2-3b", dtype="float16")
    plain = QuantSpec(kind="nf4", compute_dtype="float32")
    double = QuantSpec(kind="nf4", compute_dtype="float32", double_quant=True)
    single = ModelSpec(shape="llama-3.2-3b", dtype="float32")
    prepared: dict[str, Any] = {"prepare": True, "checkpointing": "as-prepare-leaves-it"}
    return {
        "fp16": _answered(fp16, None, "report-fp16", 4.48, 70.99, 6.09),
        "int4": _answered(fp16, plain, "report-int4", 7.63, 40.71, 2.19),
        "int4-double-quant": _answered(fp16, double, "report-int4-double-quant", 7.63, 40.71, 2.19),
        "full": _trained(_padded(full, "report-full"), 37.77, 28.45),
        "full-fp32": _trained(_padded(full, "report-full-fp32", model=single), 37.77, 28.45),
        "full-real-tokens": _trained(_packed(full, "report-full-real-tokens"), 37.77, 28.45),
        "lora": _trained(_padded(lora(), "report-lora"), 233.16, 16.26),
        "lora-real-tokens": _trained(_packed(lora(), "report-lora-real-tokens"), 233.16, 16.26),
        "lora-gc": _trained(_padded(lora(), "report-lora-gc", checkpointing="non-reentrant"), 316.09, 9.34),
        "qlora": _trained(_padded(qlora(), "report-qlora", **prepared), 375.45, 7.24),
        "qlora-gc": _trained(
            _padded(qlora(), "report-qlora-gc", prepare=True, checkpointing="non-reentrant"), 379.33, 7.24
        ),
    }


def _padded(method: Any, variant: str, *, model: ModelSpec = llama_3b, **workload: Any) -> Case:
    """Return the case with every row padded to 512 tokens: 1000 steps per epoch."""
    return finetune(
        model,
        method,
        variant=variant,
        batch=_BATCH,
        length=_LENGTH,
        padding="max_length",
        steps=_ROWS // _BATCH,
        epoch_rows=_ROWS,
        data=DataSpec(source="trace", name="wikitext2", rows=_ROWS),
        **workload,
    )


def _packed(method: Any, variant: str) -> Case:
    """Return the case with only the real tokens, packed into full rows."""
    return finetune(
        llama_3b,
        method,
        variant=variant,
        batch=_BATCH,
        length=_LENGTH,
        packing=True,
        steps=math.ceil(REAL_TOKENS / (_BATCH * _LENGTH)),
        data=DataSpec(source="trace", name="wikitext2", rows=_ROWS),
    )


def _trained(case: Case, epoch_s: float, peak_gib: float) -> Record:
    workload = case.workload
    assert isinstance(workload, FinetuneSpec)
    padded = 0 if workload.packing else _ROWS * _LENGTH - REAL_TOKENS
    return _claim(
        case,
        step_s=(epoch_s / workload.steps, "s"),
        epoch_s=(epoch_s, "s"),
        tokens=(REAL_TOKENS, "1"),
        padded_tokens=(padded, "1"),
        peak_bytes=(int(peak_gib * GiB), "bytes"),
    )


def _answered(
    model: ModelSpec, quantization: QuantSpec | None, variant: str, query_s: float, rate: float, peak_gib: float
) -> Record:
    """Return a record of 500 questions with the report's mean number of tokens (it allowed up to 512)."""
    data = DataSpec(source="trace", name="gsm8k", rows=_QUESTIONS)
    case = generate(
        model,
        quantization=quantization,
        variant=variant,
        prompts=_QUESTIONS,
        prompt_length=None,
        new_tokens=round(query_s * rate),
        data=data,
    )
    return _claim(
        case,
        query_s=(query_s, "s"),
        decode_token_s=(1 / rate, "s"),
        tokens=(round(_QUESTIONS * query_s * rate), "1"),
        tokens_per_s=(rate, "tokens/s"),
        peak_bytes=(int(peak_gib * GiB), "bytes"),
    )


def _claim(case: Case, **claims: tuple[float | int, str]) -> Record:
    metrics = {
        name: Metric(value=value, unit=unit, noise="wall", better="lower", depends_on=("case", "stack", "machine"))
        for name, (value, unit) in claims.items()
    }
    seen = Circumstances(
        machine=_MACHINE,
        stack={"torch": "2.6", "transformers": "4.57"},
        python="unknown",
        host_cpu="unknown, under WSL2",
        launched="exec",
        started_at="unknown",
        notes=("typed in from the original report, not measured by this suite",),
    )
    return judged(Record(case=case, status="ok", metrics=metrics, circumstances=seen))


def main(folder: Path = _OURS) -> str:
    """Return bench/studies/original_report/results.md: the report compared with the committed baselines of `folder`."""
    from bench.studies.original_report.page import page

    ours = {}
    for path in sorted(folder.glob("*.history.jsonl")):
        record = record_from_json(path.read_text(encoding="utf-8").splitlines()[-1])
        ours[record.case.id.partition("/")[2]] = record
    return page(report_records(), ours)
