"""A changed baseline in one line: which, from what to what, and why."""

from __future__ import annotations

from hpc_core.baselines.at_commit import BaselineChange
from hpc_core.baselines.baseline import Baseline, Change, Damaged, Lookup, Missing
from hpc_core.record import units as sizes

__all__ = ["change_line", "changed_metric"]

_SHOWN = 6


def change_line(change: BaselineChange) -> str:
    """Such as "cpu/tiny/lora: peak_bytes 5.62 GiB → 7.50 GiB (+33 %); reason: checkpointing is off on purpose"."""
    where = f"{change.machine}/{change.case}"
    if isinstance(change.new, Missing):
        return f"{where}: REMOVED"
    if not isinstance(change.new, Baseline):
        return f"{where}: {_state(change.new)}"
    reason = f"; reason: {change.reason}{' (uncommitted code)' if change.new.accepted.dirty else ''}"
    if not isinstance(change.old, Baseline):
        before = "new" if isinstance(change.old, Missing) else f"was {_state(change.old)}, now sound"
        return f"{where}: {before}, {len(change.new.metrics)} metrics{reason}"
    case = "the case changed; " if change.old.digest != change.new.digest else ""
    metrics = change.metrics
    said = ", ".join(changed_metric(each) for each in metrics[:_SHOWN]) or "every value as before"
    more = f" and {len(metrics) - _SHOWN} more" if len(metrics) > _SHOWN else ""
    return f"{where}: {case}{said}{more}{reason}"


def _state(lookup: Lookup) -> str:
    return f"DAMAGED: {lookup.reason}" if isinstance(lookup, Damaged) else "of another schema"


def changed_metric(change: Change) -> str:
    """Such as "peak_bytes 5.62 GiB → 7.50 GiB (+33 %)"."""
    if change.old is None or change.new is None:
        value = change.old if change.new is None else change.new
        assert value is not None
        return f"{change.metric} {sizes.quantity(value, change.unit)} {'dropped' if change.new is None else 'added'}"
    if change.old == change.new:
        return f"{change.metric} {sizes.quantity(change.new, change.unit)} (what is known of it changed)"
    ratio = f" ({sizes.percent(change.new / change.old - 1)})" if change.old else ""
    return f"{change.metric} {sizes.pair(change.old, change.new, change.unit)}{ratio}"
