"""Find records that are impossible: faster than the GPU's data sheet, or smaller than their own weights.

The limits come from closed forms and data sheets alone. What cannot be computed is skipped: CPUs have no sheet, and weights with a
shape of their own have no closed form. A reason contains the claim, the limit and its source.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import msgspec

from hpc_core.bounds.cost import (
    Floor,
    compute_dtypes,
    decode_floor,
    peak_rate,
    prefill_floor,
    train_floor,
)
from hpc_core.bounds.footprint import expected_bytes
from hpc_core.case.workloads import FinetuneSpec, GenerateSpec
from hpc_core.record.gpus import Gpu, gpu_of
from hpc_core.record.record import Record
from hpc_core.record.units import quantity

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


_WEIGHTS_OFF = 0.01
"""Relative difference of weights from the closed form that is allowed, for buffers and tables of other library versions."""
_STATE_SLACK = 0.99
"""A peak must reach this share of weights, gradients and optimizer state: some optimizers keep step counts on the CPU."""
_THROUGHPUT_OFF = 0.01
_CEILING_OFF = 1.05
"""A rate above this multiple of a ceiling measured in the same session is suspicious: the clocks changed, or a count is wrong."""
_MEMORY_OFF = 1.01
"""Drivers reserve different amounts of a card's memory, so the reported total varies by less than this factor."""
_CLOCKS = {"step_s": "wall time", "busy_s": "GPU-busy time"}


def impossible(record: Record) -> tuple[str, ...]:
    """Return why the record is impossible, one sentence per reason. Never raises."""
    reasons = [*_more_than_the_card(record), *_less_than_its_own(record), *_weights(record), *_throughput(record)]
    sheet = gpu_of(record.circumstances.machine)
    if sheet is not None and isinstance(record.case.workload, FinetuneSpec):
        reasons += _training(record, record.case.workload, sheet)
    elif sheet is not None and isinstance(record.case.workload, GenerateSpec):
        reasons += _generation(record, record.case.workload, sheet)
    return tuple(reasons)


def judged(record: Record) -> Record:
    """Return the record, INVALID if it is impossible. A failed record is returned unchanged."""
    reasons = () if record.failure is not None else impossible(record)
    if not reasons:
        return record
    return msgspec.structs.replace(record, status="invalid", reasons=record.reasons + reasons)


def suspicious(record: Record) -> tuple[str, ...]:
    """Return warnings about rates more than 5 % above a ceiling of the same session. A ceiling is itself measured, so this proves nothing."""
    ceilings, workload = record.circumstances.ceilings, record.case.workload
    rates = [ceilings.get(f"matmul_{name.removeprefix('t')}_flop_per_s") for name in compute_dtypes(record.case)]
    known = [rate for rate in rates if rate is not None]
    warnings = []
    if isinstance(workload, FinetuneSpec) and known and len(known) == len(rates):
        floor = train_floor(record.case, positions_of(record, workload))
        for name in _CLOCKS:
            seconds = step_seconds(record, name, workload)
            if floor is not None and seconds and floor.flops / seconds > _CEILING_OFF * max(known):
                warnings.append(
                    f"{name}: {flops_text(floor.flops / seconds)} of necessary work, above the {flops_text(max(known))} that a large matrix product reached in this session."
                )
    copy, token = ceilings.get("copy_bytes_per_s"), decode_floor(record.case)
    for name in ("decode_token_s", "busy_decode_token_s"):
        seconds = value_of(record, name)
        if copy and token is not None and seconds and token.bytes / seconds > _CEILING_OFF * copy:
            warnings.append(
                f"{name}: {token.bytes / seconds / 1e12:.2f} TB/s of weights and cache, above the {copy / 1e12:.2f} TB/s that a large copy reached in this session."
            )
    return tuple(warnings)


def _more_than_the_card(record: Record) -> Iterator[str]:
    machine = record.circumstances.machine
    sheet = gpu_of(machine)
    if sheet is not None and machine.memory_bytes > _MEMORY_OFF * sheet.memory_bytes:
        yield f"The machine reports {quantity(machine.memory_bytes, 'bytes')} of memory, but the {sheet.name} has {quantity(sheet.memory_bytes, 'bytes')}."
    for name in ("peak_bytes", "reserved_bytes"):
        value = value_of(record, name)
        if value is not None and value > machine.memory_bytes:
            yield f"{name}: {quantity(value, 'bytes')} were in use at once, but {machine.name} has {quantity(machine.memory_bytes, 'bytes')}."


def _less_than_its_own(record: Record) -> Iterator[str]:
    peak, weights = value_of(record, "peak_bytes"), value_of(record, "weights_bytes")
    if peak is None:
        return
    if weights is not None and peak < weights:
        yield f"peak_bytes: {quantity(peak, 'bytes')} is less than the model's own weights, {quantity(weights, 'bytes')} (weights_bytes)."
    held = expected_bytes(record.case)
    workload = record.case.workload
    names = ["weights_bytes"]
    if isinstance(workload, FinetuneSpec):
        # Before the optimizer's step all of them exist. A paged state may be in host memory.
        names += ["adapter_weights_bytes", "gradient_bytes"]
        names += [] if "paged" in workload.optimizer else ["optimizer_bytes"]
    parts = {name: held[name] for name in names if name in held}
    if "weights_bytes" in parts and peak < _STATE_SLACK * sum(parts.values()):
        words = " + ".join(f"{name.removesuffix('_bytes')} {quantity(size, 'bytes')}" for name, size in parts.items())
        yield f"peak_bytes: {quantity(peak, 'bytes')} is less than what must exist at once, {quantity(sum(parts.values()), 'bytes')} ({words}; closed form)."
    elif peak < held.get("weights_bytes", 0) * 0.999:
        yield f"peak_bytes: {quantity(peak, 'bytes')} is less than the model's own weights, {quantity(held['weights_bytes'], 'bytes')} (closed form)."


def _weights(record: Record) -> Iterator[str]:
    weights, expected = value_of(record, "weights_bytes"), expected_bytes(record.case).get("weights_bytes")
    if weights is not None and expected is not None and abs(weights - expected) > _WEIGHTS_OFF * expected:
        yield f"weights_bytes: {quantity(weights, 'bytes')}, but these weights take {quantity(expected, 'bytes')} (closed form): {weights / expected - 1:+.1%}."


def _throughput(record: Record) -> Iterator[str]:
    claimed, tokens, workload = value_of(record, "tokens_per_s"), value_of(record, "tokens"), record.case.workload
    if claimed is None or tokens is None or not isinstance(workload, FinetuneSpec | GenerateSpec):
        return
    name, count = ("step_s", workload.steps) if isinstance(workload, FinetuneSpec) else ("query_s", workload.prompts)
    metric = record.metrics.get(name)
    if metric is None:
        return
    seconds = sum(metric.samples) if metric.samples is not None else metric.value * count
    if seconds > 0 and abs(claimed * seconds - tokens) > _THROUGHPUT_OFF * tokens:
        yield f"tokens_per_s: {claimed:,.1f} is reported, but {tokens:,.0f} tokens in {seconds_text(seconds)} ({name}) are {tokens / seconds:,.1f}."


def _training(record: Record, workload: FinetuneSpec, sheet: Gpu) -> list[str]:
    positions = positions_of(record, workload)
    floor = None if positions is None else train_floor(record.case, positions)
    if floor is None:
        return []
    reasons = []
    for name, clock in _CLOCKS.items():
        seconds = step_seconds(record, name, workload)
        if seconds is not None:
            reasons += _too_fast(record, f"{name}: a step of {positions:,.0f} tokens", clock, seconds, floor, sheet)
    epoch = value_of(record, "epoch_s")
    if not reasons and epoch is not None and workload.epoch_rows:
        batches = workload.epoch_rows // workload.batch
        whole = Floor(flops=floor.flops * batches, bytes=floor.bytes * batches, passes=floor.passes * batches)
        reasons += _too_fast(record, f"epoch_s: an epoch of {batches:,} steps", "wall time", epoch, whole, sheet)
    return reasons


def _generation(record: Record, workload: GenerateSpec, sheet: Gpu) -> list[str]:
    prefill, decode = prefill_floor(record.case), decode_floor(record.case)
    if prefill is None or decode is None:
        return []
    more = workload.new_tokens - 1
    query = Floor(
        flops=prefill.flops + more * decode.flops, bytes=prefill.bytes + more * decode.bytes, passes=workload.new_tokens
    )
    claims = (
        ("decode_token_s", "a decoded token", "wall time", decode),
        ("busy_decode_token_s", "a decoded token", "GPU-busy time", decode),
        ("time_to_first_token_s", "the first token", "wall time", prefill),
        ("busy_prefill_s", "the prefill", "GPU-busy time", prefill),
        ("query_s", f"a query of {workload.new_tokens} new tokens", "wall time", query),
    )
    reasons = []
    for name, what, clock, floor in claims:
        seconds = value_of(record, name)
        if seconds is not None:
            reasons += _too_fast(record, f"{name}: {what}", clock, seconds, floor, sheet)
    return reasons


def _too_fast(record: Record, what: str, clock: str, seconds: float, floor: Floor, sheet: Gpu) -> list[str]:
    """Return reasons by FLOPs, by bytes, or by both."""
    peak = peak_rate(record.case, sheet)
    if peak is None:
        return []
    dtype, rate = peak
    claim = f"{what} in {seconds_text(seconds)} of {clock}"
    if seconds <= 0:
        return [f"{claim}, but it takes at least {seconds_text(floor.seconds(sheet, rate))}."]
    reasons = []
    if floor.flops > rate * seconds:
        reasons.append(
            f"{claim} would be {flops_text(floor.flops / seconds)} ({flops_text(floor.flops, 'FLOP')} at least), "
            f"{floor.flops / seconds / rate:.1f} times the {flops_text(rate)} in {dtype} of {sheet.source}."
        )
    moved = floor.memory_bytes(sheet)
    if moved > sheet.bytes_per_s * seconds:
        reasons.append(
            f"{claim} would move {moved / seconds / 1e12:.2f} TB/s ({quantity(moved, 'bytes')} at least), "
            f"{moved / seconds / sheet.bytes_per_s:.1f} times the {sheet.bytes_per_s / 1e12:.2f} TB/s of {sheet.source}."
        )
    return reasons
