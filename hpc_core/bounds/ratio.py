"""Find pairs of records that cannot both be true: full fine-tuning faster than LoRA, checkpointing without cost, a 4-bit prefill far faster."""

from __future__ import annotations

import msgspec

from hpc_core.bounds.check import (
    positions_of,
    seconds_text,
    step_seconds,
    value_of,
)
from hpc_core.bounds.cost import Floor, train_floor
from hpc_core.case.workloads import FinetuneSpec, GenerateSpec
from hpc_core.record.record import Record
from hpc_core.record.units import quantity

BUSY_MARGIN = 0.9
"""Least share of LoRA's GPU-busy time that full fine-tuning takes. LoRA's small kernels cost time beyond their FLOPs (measured: 1.10)."""
WALL_MARGIN = 0.5
"""The same for wall time. The host launches many more kernels for LoRA (measured on a slow host: 0.80)."""

_SAME_PEAK = 0.99


def ratio_impossible(a: Record, b: Record) -> tuple[str, ...]:
    """Return why two records cannot both be true; empty if they are not full fine-tuning and LoRA of the same work. The order is free.

    Full fine-tuning needs LoRA's products, the weight gradients, and the memory traffic of an optimizer over all weights. If it is
    faster by more than the margin, the two did not do the same work.
    """
    full, lora = (a, b) if a.case.adapter is None else (b, a)
    if not _comparable(full, lora):
        return ()
    name = "busy_s" if "busy_s" in full.metrics and "busy_s" in lora.metrics else "step_s"
    clock, margin = ("GPU-busy time", BUSY_MARGIN) if name == "busy_s" else ("wall time", WALL_MARGIN)
    times = _per_token(full, name), _per_token(lora, name)
    floors = _one_token(full), _one_token(lora)
    if times[0] is None or times[1] is None or floors[0] is None or floors[1] is None:
        return ()
    if times[0] >= margin * times[1]:
        return ()
    return (
        f"{full.case.id} takes {seconds_text(times[0])} of {clock} per token and {lora.case.id} {seconds_text(times[1])}: "
        f"{times[0] / times[1]:.2f} of it, below {margin:g}. At equal precision and tokens, full fine-tuning needs "
        f"{floors[0].flops / floors[1].flops:.2f} times the FLOPs, and {quantity(floors[0].bytes - floors[1].bytes, 'bytes')} more memory traffic per step: they did not do the same work.",
    )


def checkpointing_impossible(plain: Record, checkpointed: Record) -> tuple[str, ...]:
    """Return why these cannot be the same training step without and with checkpointing; empty if they can, or are not comparable.

    Checkpointing runs every layer's forward twice and keeps fewer activations: it cannot take less GPU-busy time, nor peak as high.
    """
    one, other = plain.case, checkpointed.case
    if not isinstance(one.workload, FinetuneSpec) or not isinstance(other.workload, FinetuneSpec):
        return ()
    same = (one.model, one.quantization, one.adapter) == (other.model, other.quantization, other.adapter)
    work = [msgspec.structs.replace(_work(load), checkpointing="off") for load in (one.workload, other.workload)]
    if not same or work[0] != work[1] or not _same_machine(plain, checkpointed):
        return ()
    reasons = []
    times = value_of(plain, "busy_s"), value_of(checkpointed, "busy_s")
    if times[0] is not None and times[1] is not None and times[1] < times[0]:
        reasons.append(
            f"{other.id} takes {seconds_text(times[1])} of GPU-busy time per step, {one.id} {seconds_text(times[0])}: recomputing every layer cannot take less."
        )
    peaks = value_of(plain, "peak_bytes"), value_of(checkpointed, "peak_bytes")
    if peaks[0] is not None and peaks[1] is not None and peaks[1] >= _SAME_PEAK * peaks[0]:
        reasons.append(
            f"{other.id} peaks at {quantity(peaks[1], 'bytes')}, {one.id} at {quantity(peaks[0], 'bytes')}: checkpointing keeps fewer activations, so both or neither checkpointed."
        )
    return tuple(reasons)


def four_bit_impossible(plain: Record, quantized: Record) -> tuple[str, ...]:
    """Return why a 4-bit prefill cannot be that much faster than the unquantized one; empty if it can, or if they are not comparable.

    The weights are dequantized and multiplied in a float dtype: the same products, plus the dequantization.
    """
    one, other = plain.case, quantized.case
    if one.quantization is not None or other.quantization is None or other.quantization.kind == "int8":
        return ()
    if not isinstance(one.workload, GenerateSpec) or one.workload != other.workload or one.model != other.model:
        return ()
    times = value_of(plain, "busy_prefill_s"), value_of(quantized, "busy_prefill_s")
    if not _same_machine(plain, quantized) or times[0] is None or times[1] is None:
        return ()
    if times[1] >= BUSY_MARGIN * times[0]:
        return ()
    return (
        f"{other.id} takes {seconds_text(times[1])} of GPU-busy time for its prefill, {one.id} {seconds_text(times[0])}: {times[1] / times[0]:.2f} of it, below {BUSY_MARGIN:g}. "
        "4-bit weights are multiplied in a float dtype, so the products are the same: they did not do the same work.",
    )


def _same_machine(a: Record, b: Record) -> bool:
    return a.circumstances.machine.key == b.circumstances.machine.key


def _comparable(full: Record, lora: Record) -> bool:
    """Return whether these are full fine-tuning and LoRA of one unquantized model on one machine, over the same tokens."""
    one, other = full.case, lora.case
    if one.adapter is not None or other.adapter is None:
        return False
    if not isinstance(one.workload, FinetuneSpec) or not isinstance(other.workload, FinetuneSpec):
        return False
    if one.quantization is not None or other.quantization is not None or one.model != other.model:
        return False
    if not _same_machine(full, lora):
        return False
    return _work(one.workload) == _work(other.workload)


def _work(workload: FinetuneSpec) -> FinetuneSpec:
    """Return the workload without the fields that do not change the time per token."""
    return msgspec.structs.replace(workload, steps=1, epoch_rows=None, learning_rate=1.0)


def _per_token(record: Record, name: str) -> float | None:
    workload = record.case.workload
    assert isinstance(workload, FinetuneSpec)
    seconds, positions = step_seconds(record, name, workload), positions_of(record, workload)
    return None if seconds is None or not positions or seconds <= 0 else seconds / positions


def _one_token(record: Record) -> Floor | None:
    return train_floor(record.case, 1.0)
