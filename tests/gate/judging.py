"""Baselines without the disk, and intervals straight from samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from hpc_core.baselines.accept import unstored
from hpc_core.baselines.baseline import Accepted, Baseline
from hpc_core.case.case import SCHEMA
from hpc_core.gate.intervals import Interval, Spread, interval_of, paired_distance, stored_distance
from hpc_core.record.record import Machine, Metric, Record
from tests.strategies import H100, STACK, a_case

UPDATE = 'pytest --benchmark --case tiny/lora --perf-update --reason "…"'
CPU_BYTES: dict[str, Any] = {"depends_on": ("case", "stack")}


def baseline(record: Record, **changes: Any) -> Baseline:
    """Return the baseline that a record becomes, with these fields changed."""
    return msgspec.structs.replace(unstored(record, reason="r"), **changes)


def stored(metrics: dict[str, Metric], machine: Machine = H100) -> Baseline:
    """Return a baseline of the default case with these metrics, sound or not."""
    case = a_case()
    return Baseline(
        schema=SCHEMA,
        case=case.id,
        digest=case.digest,
        spec=case,
        machine=machine,
        stack=STACK,
        python="3.11.9",
        accepted=Accepted(reason="r", at="2026-11-23T12:00:00+00:00", commit=None, dirty=None),
        metrics=metrics,
    )


def busy_interval(new: Sequence[float], sessions: Sequence[Sequence[float]], spread: Spread, alpha: float) -> Interval:
    """Return the interval of a new session against the stored ones."""
    return interval_of(stored_distance(new, sessions, spread), alpha)


def paired_interval(
    base: Sequence[float], head: Sequence[float], alpha: float, spread: Spread | None = None
) -> Interval:
    """Return the interval of head against base, in pairs."""
    return interval_of(paired_distance(base, head, spread), alpha)
