"""Full-size cases made short, or changed in one thing, for trying faults."""

from __future__ import annotations

from hpc_core.case.case import Case, GenerateSpec
from hpc_core.catalogue.full_size import FULL
from hpc_core.catalogue.small import SOAK_TRACE, TINY_TRACE

__all__ = ["TRIAL", "WHOLE"]


def _short(case: Case) -> Case:
    """The case `<id>-4-layers`: each layer at full width, a handful of steps."""
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
"""Full-size work made short, for trying faults on a GPU. Not in ALL: no baseline is kept of them, a clean run in the same session is one."""

WHOLE: tuple[Case, ...] = (*FULL, _lora.vary("lora-8bit", optimizer="adamw-8bit", rank=32))
"""Whole full-size cases, for trying faults on predictions."""
