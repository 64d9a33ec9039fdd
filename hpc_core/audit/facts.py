"""What facts say: the verdict of the audit, and names that facts are written with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from hpc_core.record.findings import Findings
from hpc_core.record.record import Fact


def verdict(facts: Mapping[str, Fact]) -> tuple[str, ...]:
    """Return why a record with these facts is INVALID: one sentence for each that does not hold."""
    return tuple(
        f"{name}: asked for {fact.asked!r}, saw {fact.seen!r}." for name, fact in facts.items() if not fact.holds
    )


def injected(fault: str, hits: int, case_id: str) -> Findings:
    """Return how often a fault's code ran; a fault that was never reached proves nothing, and makes the record INVALID."""
    note = f"the fault {fault} was injected; its changed code ran {hits:,} times"
    reason = (
        f"The fault {fault} was injected, but {case_id} never reaches the code that it changes: it proves nothing here."
    )
    return Findings(notes=(note,), reasons=() if hits else (reason,))


def dtype_name(dtype: torch.dtype | None) -> str:
    """Return the name that specifications use, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def names(dtypes: Iterable[torch.dtype | None]) -> list[str]:
    """Return the distinct names, sorted."""
    return sorted({dtype_name(dtype) for dtype in dtypes})
