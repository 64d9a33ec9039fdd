"""In which unit an axis of memory is labelled."""

from __future__ import annotations

from collections.abc import Iterable

from hpc_core.report.entry import Entry

__all__ = ["memory_unit", "peak_unit"]

_GIB = 2**30


def memory_unit(largest_bytes: float) -> tuple[int, str]:
    """Bytes a unit, and its name: GiB, or MiB where the largest value is below one GiB."""
    return (_GIB, "GiB") if largest_bytes >= _GIB else (2**20, "MiB")


def peak_unit(entries: Iterable[Entry]) -> tuple[int, str]:
    """The unit for the peaks of these cases."""
    return memory_unit(max((entry.value("peak_bytes") or 0.0 for entry in entries), default=0.0))
