"""Read a record's metrics without raising on missing ones, and format numbers."""

from __future__ import annotations

import statistics

from hpc_core.case.workloads import FinetuneSpec
from hpc_core.record.record import Record

_PROFILED_STEPS = 10
"""`busy_s` is the mean of this many steps."""


def value_of(record: Record, name: str) -> float | None:
    """Return a metric's value; None if the record does not have it."""
    metric = record.metrics.get(name)
    return None if metric is None else float(metric.value)


def positions_of(record: Record, workload: FinetuneSpec) -> float | None:
    """Return the tokens of a step, padding included: as counted, or for full rows. None if only the data decides."""
    tokens = value_of(record, "tokens")
    if tokens is not None:
        return (tokens + (value_of(record, "padded_tokens") or 0.0)) / workload.steps
    return None if workload.padding == "longest" else float(workload.batch * workload.length)


def step_seconds(record: Record, name: str, workload: FinetuneSpec) -> float | None:
    """Return the seconds of a step by `step_s` or `busy_s`; None if they do not belong to the counted tokens.

    If widths differ, the median step is not the mean step: the mean of the samples is used, and busy time only over whole passes.
    If all steps are equal, the shorter of value and mean is used.
    """
    metric = record.metrics.get(name)
    if metric is None:
        return None
    ragged = workload.padding == "longest"
    if ragged and name == "busy_s" and _PROFILED_STEPS % workload.steps:
        return None
    if metric.samples is None:
        return float(metric.value)
    mean = statistics.fmean(metric.samples)
    return mean if ragged else min(mean, float(metric.value))


def flops_text(rate: float, unit: str = "FLOP/s") -> str:
    """Format a rate: 1.06 PFLOP/s, 209.5 TFLOP/s."""
    for prefix, factor in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if rate >= factor:
            return f"{rate / factor:.4g} {prefix}{unit}"
    return f"{rate:.4g} {unit}"


def seconds_text(seconds: float) -> str:
    """Format seconds: 37.8 s, 37.8 ms, 37.8 µs."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}" if seconds < 1000 else f"{seconds:.1f} s"
    return f"{seconds:.3g} s"
