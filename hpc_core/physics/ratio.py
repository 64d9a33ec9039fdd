"""What two records cannot both claim: full fine-tuning faster than LoRA, for the same tokens in the same precision."""

from __future__ import annotations

import msgspec

from hpc_core.physics.floors import Floor, train_floor
from hpc_core.physics.reading import bytes_text, positions_of, seconds_text, step_seconds
from hpc_core.record import Record
from hpc_core.spec import FinetuneSpec

__all__ = ["BUSY_MARGIN", "WALL_MARGIN", "ratio_impossible"]

BUSY_MARGIN = 0.9
"""Full may take so much of LoRA's GPU-busy time: LoRA's small kernels cost time that its FLOPs do not show (seen: 1.10)."""
WALL_MARGIN = 0.5
"""And so much of its wall time, where the host launches LoRA's many more kernels (seen on a slow host: 0.80)."""


def ratio_impossible(a: Record, b: Record) -> tuple[str, ...]:
    """Why these two cannot both be, in either order; empty where they are not full and LoRA of the same work.

    Full fine-tuning needs LoRA's products, the weight gradients besides, and the traffic of an optimizer over all
    weights. Whoever reports it faster by more than the margin did not do the same work in both rows.
    """
    full, lora = (a, b) if a.case.adapter is None else (b, a)
    if not _comparable(full, lora):
        return ()
    name = "busy_s" if "busy_s" in full.metrics and "busy_s" in lora.metrics else "step_s"
    least, margin = ("GPU-busy time", BUSY_MARGIN) if name == "busy_s" else ("wall time", WALL_MARGIN)
    times = _per_token(full, name), _per_token(lora, name)
    floors = _one_token(full), _one_token(lora)
    if times[0] is None or times[1] is None or floors[0] is None or floors[1] is None:
        return ()
    if times[0] >= margin * times[1]:
        return ()
    return (
        f"{full.case.id} takes {seconds_text(times[0])} of {least} a token and {lora.case.id} {seconds_text(times[1])}: "
        f"{times[0] / times[1]:.2f} of it, below {margin:g}. In equal precision and tokens full fine-tuning needs "
        f"{floors[0].flops / floors[1].flops:.2f} times the FLOPs, and {bytes_text(floors[0].bytes - floors[1].bytes)} more traffic a step: they did not do the same work.",
    )


def _comparable(full: Record, lora: Record) -> bool:
    """Full and LoRA of one model on one machine, not quantized, over the same tokens."""
    one, other = full.case, lora.case
    if one.adapter is not None or other.adapter is None:
        return False
    if not isinstance(one.workload, FinetuneSpec) or not isinstance(other.workload, FinetuneSpec):
        return False
    if one.quantization is not None or other.quantization is not None or one.model != other.model:
        return False
    if full.circumstances.machine.key != lora.circumstances.machine.key:
        return False
    return _work(one.workload) == _work(other.workload)


def _work(workload: FinetuneSpec) -> FinetuneSpec:
    """The workload without what leaves a token's time as it is."""
    return msgspec.structs.replace(workload, steps=1, epoch_rows=None, learning_rate=1.0)


def _per_token(record: Record, name: str) -> float | None:
    workload = record.case.workload
    assert isinstance(workload, FinetuneSpec)
    seconds, positions = step_seconds(record, name, workload), positions_of(record, workload)
    return None if seconds is None or not positions or seconds <= 0 else seconds / positions


def _one_token(record: Record) -> Floor | None:
    return train_floor(record.case, 1.0)
