"""Intervals straight from samples, as the gate's tests want them."""

from __future__ import annotations

from collections.abc import Sequence

from hpc_core.gate.intervals import Interval, Spread, interval_of, paired_distance, stored_distance


def busy_interval(new: Sequence[float], sessions: Sequence[Sequence[float]], spread: Spread, alpha: float) -> Interval:
    """Return the interval of a new session against the stored ones."""
    return interval_of(stored_distance(new, sessions, spread), alpha)


def paired_interval(
    base: Sequence[float], head: Sequence[float], alpha: float, spread: Spread | None = None
) -> Interval:
    """Return the interval of head against base, in pairs."""
    return interval_of(paired_distance(base, head, spread), alpha)
