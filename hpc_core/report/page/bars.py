"""Rows of bars for the page: one case a row, the same cases beside each other by memory, time and speed; and memory by category."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from hpc_core.record import units as sizes
from hpc_core.report.entry import BUSY, WALL, Entry
from hpc_core.report.page.cases import anchor, tone

__all__ = ["CATEGORIES", "categories", "multiples"]

CATEGORIES = (
    "weights",
    "adapter",
    "gradients",
    "optimizer",
    "kv_cache",
    "activations",
    "temporaries",
    "rounding",
    "other",
)
"""Of memory at the peak, from what stays to what passes."""
_MOST_ROWS = 40
_COLUMNS = (("peak memory", ("peak_bytes",)), ("GPU-busy", BUSY), ("wall", WALL), ("tokens/s", ("tokens_per_s",)))
_KINDS = {"generate": "Generation", "finetune": "Fine-tuning", "callable": "Own steps"}


def multiples(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """A block a kind of work; each column has a scale of its own, from zero."""
    blocks = []
    for kind, title in _KINDS.items():
        chosen = [entry for entry in entries if entry.record.case.kind == kind and entry.metrics]
        shown = chosen[:_MOST_ROWS]
        columns = [_column(shown, label, names) for label, names in _COLUMNS]
        columns = [column for column in columns if any(column["cells"])]
        if shown and columns:
            named = [
                {"label": _label(each, shown), "anchor": anchor(each), "tone": tone(each.row.verdict)} for each in shown
            ]
            per = {"generate": "GPU-busy and wall time are of one decoded token.", "finetune": "Times are of one step."}
            more = len(chosen) - len(shown)
            blocks.append({"title": title, "rows": named, "columns": columns, "more": more, "per": per.get(kind, "")})
    return blocks


def _label(entry: Entry, among: Sequence[Entry]) -> str:
    """The variant alone where all are of one model."""
    shapes = {each.case.partition("/")[0] for each in among}
    return entry.case if len(shapes) > 1 else entry.case.partition("/")[2]


def _column(entries: Sequence[Entry], label: str, names: Sequence[str]) -> dict[str, Any]:
    spreads = [entry.spread(*names) for entry in entries]
    values = [entry.value(*names) for entry in entries]
    most = max((abs(value) for value in values if value is not None), default=0.0)
    most = max([most, *(abs(spread.high) for spread in spreads if spread is not None)])
    cells: list[dict[str, Any] | None] = []
    for entry, value, spread in zip(entries, values, spreads, strict=True):
        name = entry.name_of(*names)
        if value is None or name is None:
            cells.append(None)
            continue
        unit = entry.metrics[name].unit
        text = (
            f"{value:,.0f}"
            if unit == "tokens/s" and value >= 100
            else sizes.quantity(value, unit).replace(" tokens/s", "")
        )
        cell: dict[str, Any] = {"text": text, "width": _share(value, most), "range": None}
        if spread is not None and spread.high > spread.low:
            cell["range"] = (_share(spread.low, most), _share(spread.high, most))
            cell["told"] = f"{sizes.pair(spread.low, spread.high, unit)}, {spread.count} values".replace("→", "to")
        cells.append(cell)
    return {"label": label, "cells": cells}


def _share(value: float, most: float) -> float:
    return round(100 * max(0.0, value) / most, 2) if most > 0 else 0.0


def categories(entries: Sequence[Entry]) -> dict[str, Any] | None:
    """Memory at the peak by category, a stacked bar a case, all on one scale; None where no case has it."""
    rows = [(entry, held) for entry in entries if (held := _held(entry))][:_MOST_ROWS]
    if not rows:
        return None
    most = max(sum(held.values()) for _, held in rows)
    among = [entry for entry, _ in rows]
    drawn = []
    for entry, held in rows:
        ends = list(itertools.accumulate(held.values()))
        parts = [
            {
                "name": name,
                "x": _share(end - size, most),
                "width": _share(size, most),
                "text": sizes.quantity(size, "bytes"),
            }
            for (name, size), end in zip(held.items(), ends, strict=True)
        ]
        total = sizes.quantity(ends[-1], "bytes")
        drawn.append({"label": _label(entry, among), "anchor": anchor(entry), "parts": parts, "total": total})
    used = [name for name in CATEGORIES if any(name in held for _, held in rows)]
    return {"rows": drawn, "legend": used}


def _held(entry: Entry) -> dict[str, int]:
    found = {}
    for name in CATEGORIES:
        value = entry.value(f"at_peak_{name}_bytes")
        if value is not None and value > 0:
            found[name] = int(value)
    return found
