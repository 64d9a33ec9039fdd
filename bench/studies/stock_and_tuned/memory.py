"""Describe which engine cases use more memory than their stock cases, for bench/studies/stock_and_tuned/results.md."""

from __future__ import annotations

from collections.abc import Iterable

from hpc_core.case.limits import MiB
from hpc_core.gate.tolerance import tolerance
from hpc_core.record.record import Record

__all__ = ["memory_text"]

_PEAK = "peak_bytes"


def memory_text(pairs: Iterable[tuple[Record, Record]]) -> str:
    """Return how many engine peaks of (stock, engine) pairs are within the gate's tolerance, and by how much the others exceed it.

    Returns "" if no pair has both peaks.
    """
    known = [(stock, mine) for stock, mine in pairs if _PEAK in stock.metrics and _PEAK in mine.metrics]
    if not known:
        return ""
    more = [text for stock, mine in known if (text := _excess(stock, mine))]
    counted = f"{len(known) - len(more)} of {len(known)} engine rows peak no higher than their stock row, within the gate's tolerance for bytes (0.05 % or 2 MiB)."
    return f"**Memory.** {counted}" + (f" Higher: {'; '.join(more)}." if more else "")


def _excess(stock: Record, mine: Record) -> str:
    accepted = stock.metrics[_PEAK]
    over = mine.metrics[_PEAK].value - accepted.value
    if over <= tolerance(_PEAK, accepted).distance:
        return ""
    return f"`{mine.case.id}` by {over / MiB:,.1f} MiB ({over / accepted.value:.2%}), measured {mine.circumstances.started_at[:10]}"
