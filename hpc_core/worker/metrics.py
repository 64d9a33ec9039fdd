"""How each metric is declared: unit, noise class, direction, what it depends on. One place, so that names mean one thing.

On a GPU, bytes, kernels and busy time depend on the machine; on a CPU only what the stack decides is gated.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Literal

from hpc_core.record.record import Dependence, Metric

__all__ = ["busy", "counted", "measured_bytes", "ratio", "reported", "tensor_bytes", "wall"]

_CASE: tuple[Dependence, ...] = ("case",)
_STACK: tuple[Dependence, ...] = ("case", "stack")
_MACHINE: tuple[Dependence, ...] = ("case", "stack", "machine")


def measured_bytes(value: int, *, machine: bool, gated: bool = True, note: str | None = None) -> Metric:
    """Bytes of memory: the allocator's on a GPU (`machine`), of tensors on a CPU."""
    return Metric(
        value=value,
        unit="bytes",
        noise="exact",
        better="lower",
        depends_on=_MACHINE if machine else _STACK,
        gated=gated,
        note=note,
    )


def tensor_bytes(value: int, *, note: str | None = None) -> Metric:
    """Bytes of tensors that the stack decides, whatever the machine: weights, optimizer state."""
    return Metric(value=value, unit="bytes", noise="exact", better="lower", depends_on=_STACK, note=note)


def counted(
    value: int,
    *,
    better: Literal["lower", "same"] = "lower",
    machine: bool = False,
    unit: str = "1",
    case_only: bool = False,
    gated: bool = True,
) -> Metric:
    """A count that is equal in every run: kernels, operators, FLOPs, tokens, parameters."""
    depends = _CASE if case_only else _MACHINE if machine else _STACK
    return Metric(value=value, unit=unit, noise="exact", better=better, depends_on=depends, gated=gated)


def busy(value_s: float) -> Metric:
    """GPU-busy seconds."""
    return Metric(value=value_s, unit="s", noise="busy", better="lower", depends_on=_MACHINE)


def wall(samples_s: Sequence[float]) -> Metric:
    """Seconds by the host's clock: shown and stored, not gated from a single run."""
    return Metric(
        value=statistics.median(samples_s),
        samples=tuple(samples_s),
        unit="s",
        noise="wall",
        better="lower",
        depends_on=_MACHINE,
        gated=False,
    )


def reported(
    value: float, unit: str, *, better: Literal["lower", "higher", "same"] = "lower", note: str | None = None
) -> Metric:
    """A number for the reader: derived from wall time, or not reproducible. Never gated."""
    return Metric(value=value, unit=unit, noise="wall", better=better, depends_on=_MACHINE, gated=False, note=note)


def ratio(value: float, *, note: str | None = None) -> Metric:
    """A share of a ceiling or of wall time; higher is better."""
    return reported(value, "ratio", better="higher", note=note)
