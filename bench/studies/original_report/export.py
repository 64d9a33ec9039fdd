"""Convert records to the two JSON files of the original report, with its names and units.

The report says "GB" for bytes / 1024**3; so do these files, and they say that they do. Its averages stay averages: a
latency here is the mean of all queries, where our own tables show the median.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from hpc_core.case.limits import GiB
from hpc_core.case.workloads import FinetuneSpec, GenerateSpec
from hpc_core.record.record import Record

__all__ = ["EPOCHS", "FINETUNE_FILE", "INFERENCE_FILE", "original_files"]

INFERENCE_FILE = "baseline_inference_metrics.json"
FINETUNE_FILE = "baseline_finetune_metrics.json"
EPOCHS = 2
"""What a total time covers in the report."""

_UNITS = {
    "avg_latency": "seconds a query, mean of all queries",
    "throughput_tokens_per_sec": "new tokens over seconds, prefill included",
    "total_time": f"seconds for {EPOCHS} epochs",
    "time_per_epoch": "seconds",
    "peak_memory_gb": "bytes / 1024**3, allocated by tensors (the report's GB are GiB)",
    "extrapolated": "true where fewer steps or tokens were measured than stated",
}


def original_files(records: Iterable[Record]) -> dict[str, dict[str, Any]]:
    """Return the content of each file by its name. A method is a case's variant; if it has no numbers, it has the reason.

    If cases have several shapes, methods are whole ids.
    """
    chosen = sorted(records, key=lambda record: record.case.id)
    shapes = {record.case.id.partition("/")[0] for record in chosen}
    files: dict[str, dict[str, Any]] = {INFERENCE_FILE: {}, FINETUNE_FILE: {}}
    for record in chosen:
        method = record.case.id if len(shapes) > 1 else record.case.id.partition("/")[2]
        workload = record.case.workload
        if isinstance(workload, GenerateSpec):
            files[INFERENCE_FILE][method] = _without_numbers(record) or _inference(record, workload)
        elif isinstance(workload, FinetuneSpec):
            files[FINETUNE_FILE][method] = _without_numbers(record) or _finetune(record, workload)
    return {name: {"methods": methods, "units": _units(methods)} for name, methods in files.items() if methods}


def _units(methods: dict[str, Any]) -> dict[str, str]:
    named = {key for method in methods.values() for key in method}
    return {key: text for key, text in _UNITS.items() if key in named}


def _without_numbers(record: Record) -> dict[str, Any] | None:
    if record.status == "ok":
        return None
    why = record.failure.message if record.failure is not None else " ".join(record.reasons)
    return {"case": record.case.id, "status": record.status, "reason": why}


def _inference(record: Record, workload: GenerateSpec) -> dict[str, Any]:
    queries = record.metrics["query_s"]
    further = record.metrics.get("query_extrapolated_s")
    seconds = statistics.fmean(queries.samples or (queries.value,))
    tokens = workload.new_tokens
    if further is not None and workload.extrapolate_to is not None:
        seconds, tokens = further.value, workload.extrapolate_to
    throughput = workload.batch * tokens / seconds if further is not None else record.metrics["tokens_per_s"].value
    return {
        "avg_latency": seconds,
        "throughput_tokens_per_sec": throughput,
        "peak_memory_gb": record.metrics["peak_bytes"].value / GiB,
        "queries": len(queries.samples or (queries.value,)),
        "new_tokens": tokens,
        "extrapolated": further is not None,
        **_origin(record),
    }


def _finetune(record: Record, workload: FinetuneSpec) -> dict[str, Any]:
    steps = record.metrics["step_s"].samples or (record.metrics["step_s"].value,)
    needed = _steps_of_all_epochs(workload)
    whole = needed is not None and len(steps) >= needed
    total = sum(steps[:needed]) if whole else EPOCHS * record.metrics["epoch_s"].value
    return {
        "total_time": total,
        "time_per_epoch": total / EPOCHS,
        "peak_memory_gb": record.metrics["peak_bytes"].value / GiB,
        "steps_measured": len(steps),
        "extrapolated": not whole,
        **_origin(record),
    }


def _steps_of_all_epochs(workload: FinetuneSpec) -> int | None:
    """Return the number of steps; None if it depends on the lengths of the texts."""
    rows = workload.epoch_rows or workload.data.rows
    return None if rows is None or workload.packing else EPOCHS * (rows // workload.batch)


def _origin(record: Record) -> dict[str, Any]:
    seen = record.circumstances
    return {"case": record.case.id, "digest": record.case.digest, "machine": seen.machine.name, "stack": seen.stack}
