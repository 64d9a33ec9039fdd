"""Which engine cases take more memory than their stock twins, in words: for bench/studies/stock_and_tuned/results.md."""

from __future__ import annotations

from collections.abc import Iterable

from hpc_core.case.limits import MiB
from hpc_core.gate.tolerance import tolerance
from hpc_core.record.record import Record

__all__ = ["memory_told"]

_PEAK = "peak_bytes"


def memory_told(pairs: Iterable[tuple[Record, Record]]) -> str:
    """A sentence or two on peaks of (stock, engine) pairs: how many are not above their twin's by more than the gate allows, and by what the others are.

    "" where no pair has both peaks.
    """
    known = [(stock, mine) for stock, mine in pairs if _PEAK in stock.metrics and _PEAK in mine.metrics]
    if not known:
        return ""
    more = [text for stock, mine in known if (text := _excess(stock, mine))]
    counted = f"{len(known) - len(more)} of {len(known)} rows with a measured twin peak no higher than it, by the gate's tolerance for bytes (0.05 % or 2 MiB)."
    return f"**Memory.** {counted}" + (f" Higher: {'; '.join(more)}." if more else "")


def _excess(stock: Record, mine: Record) -> str:
    accepted = stock.metrics[_PEAK]
    over = mine.metrics[_PEAK].value - accepted.value
    if over <= tolerance(_PEAK, accepted).distance:
        return ""
    return f"`{mine.case.id}` by {over / MiB:,.1f} MiB ({over / accepted.value:.2%}), measured {mine.circumstances.started_at[:10]}"
