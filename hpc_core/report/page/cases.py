"""Cases as the page's template takes them: rows of the table, what moved, details. Plain texts and numbers, nothing escaped yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from hpc_core.baselines.reading import plain
from hpc_core.case.case import case_to_json
from hpc_core.gate.verdict import MetricVerdict
from hpc_core.record import units as sizes
from hpc_core.report.entry import BUSY, WALL, Entry
from hpc_core.report.terminal import caption

__all__ = ["anchor", "columns_of", "details_of", "moved_of", "rows_of", "tone"]

_TONES = {
    "PASS": "good",
    "OK": "good",
    "IMPROVED": "better",
    "REGRESSED": "bad",
    "INVALID": "bad",
    "BROKEN": "bad",
}
_LONGEST = 300
_LONGEST_CAUSE = 1500
"""Of a line of the cause, which names categories, modules and operators: cut, it says nothing."""
_MOST_CAUSES = 30
_MOST_METRICS = 60
_ROW_BYTES = 110
"""About what a metric's row takes on the page."""


def tone(verdict: str) -> str:
    """A class of the style sheet: good, better, bad or open."""
    return _TONES.get(verdict, "open")


def anchor(entry: Entry) -> str:
    """The id of a case's details on the page."""
    return f"c-{entry.machine}-{entry.case.replace('/', '--')}"


def rows_of(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """A row of the table each: what is shown, and the numbers to sort by."""
    return [_row(entry) for entry in entries]


def _row(entry: Entry) -> dict[str, Any]:
    row = entry.row
    shape, _, variant = entry.case.partition("/")
    leading = None if entry.judgement is None else next(iter(entry.judgement.metrics), None)
    return {
        "anchor": anchor(entry),
        "case": entry.case,
        "shape": shape,
        "variant": variant,
        "machine": entry.machine,
        "verdict": row.verdict,
        "tone": tone(row.verdict),
        "severity": -1 if entry.judgement is None else entry.judgement.verdict.severity,
        "cells": [
            ("peak memory", row.peak, entry.value("peak_bytes")),
            ("GPU-busy", row.busy, entry.value(*BUSY)),
            ("wall", row.wall, entry.value("step_s", "query_s")),
            ("tokens/s", row.tokens_per_s, entry.value("tokens_per_s")),
            ("of ceiling", plain(row.share, 40), entry.value("mfu", "mbu")),
        ],
        "change": plain(row.change, 80),
        "ratio": None if leading is None or leading.ratio is None else leading.ratio,
    }


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns of numbers that some case has; what no case has is no column."""
    return list(dict.fromkeys(name for row in rows for name, text, _ in row["cells"] if text != "-")) or ["peak memory"]


def moved_of(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Cases that need a look, the gravest first, with why."""
    moved = [entry for entry in entries if entry.needs_a_look]
    moved.sort(key=lambda entry: -(7 if entry.judgement is None else entry.judgement.verdict.severity))
    return [_moved(entry) for entry in moved]


def _moved(entry: Entry) -> dict[str, Any]:
    judgement, failure = entry.judgement, entry.record.failure
    lines: list[str] = []
    if failure is not None:
        headline = f"{failure.kind} in {failure.phase}: {failure.message}"
    elif judgement is None:
        headline = " ".join(entry.record.reasons)
    else:
        headline = judgement.headline
        lines = [judgement.reason, *entry.grown, *(f"moved: {package}" for package in judgement.moved)]
    return {
        "anchor": anchor(entry),
        "case": entry.case,
        "machine": entry.machine,
        "verdict": entry.row.verdict,
        "tone": tone(entry.row.verdict),
        "headline": plain(headline, _LONGEST),
        "why": _why(entry),
        "more": []
        if entry.cause is None
        else [plain(line, _LONGEST_CAUSE) for line in entry.cause.details[:_MOST_CAUSES]],
        "lines": [plain(line, _LONGEST) for line in lines if line != headline][:8],
        "step": "" if judgement is None else plain(judgement.next_step, _LONGEST),
    }


def _why(entry: Entry) -> list[str]:
    """The two lines of the cause."""
    return [] if entry.cause is None else [plain(line, _LONGEST_CAUSE) for line in entry.cause.lines]


def details_of(entries: Sequence[Entry], most_bytes: int) -> list[dict[str, Any]]:
    """Everything of a case that a reader may ask for, of as many cases as about so many bytes hold; those that moved come first."""
    found, size = [], 0
    for entry in sorted(entries, key=lambda each: not each.needs_a_look):
        one = _details(entry)
        size += 1500 + _ROW_BYTES * len(one["metrics"]) + sum(map(len, one["why"]))
        if size > most_bytes:
            break
        found.append(one)
    return sorted(found, key=lambda each: (each["machine"], each["case"]))


def _details(entry: Entry) -> dict[str, Any]:
    record = entry.record
    verdicts = {} if entry.judgement is None else {each.metric: each for each in entry.judgement.metrics}
    chosen = [name for name in record.metrics if name in verdicts or record.metrics[name].gated]
    named = [
        name for name in (entry.name_of(*WALL), entry.name_of("tokens_per_s"), entry.name_of("reserved_bytes")) if name
    ]
    names = list(dict.fromkeys([*sorted(chosen), *named]))[:_MOST_METRICS]
    families = sorted(record.kernel_families.items(), key=lambda each: -each[1].seconds)[:12]
    total = sum(max(0.0, family.seconds) for _, family in families)
    return {
        "anchor": anchor(entry),
        "case": entry.case,
        "machine": entry.machine,
        "verdict": entry.row.verdict,
        "tone": tone(entry.row.verdict),
        "caption": plain(caption(record), _LONGEST * 2),
        "sessions": len(entry.past),
        "started_at": plain(record.circumstances.started_at, 40),
        "digest": record.case.digest,
        "spec": _spec(entry),
        "why": _why(entry),
        "metrics": [_metric(entry, name, verdicts.get(name)) for name in names],
        "families": [
            {
                "name": plain(name, 60),
                "share": max(0.0, family.seconds) / total if total else 0.0,
                "seconds": sizes.quantity(family.seconds, "s"),
                "kernels": f"{family.kernels:,}",
            }
            for name, family in families
        ],
        "makers": [
            {"name": plain(name, 80), "bytes": sizes.quantity(size, "bytes")}
            for name, size in sorted(record.makers_at_peak.items(), key=lambda each: -each[1])[:8]
        ],
        "notes": [plain(note, _LONGEST) for note in record.circumstances.notes[:4]],
    }


def _spec(entry: Entry) -> list[tuple[str, str]]:
    """The stated fields of the case, by part."""
    parts = msgspec.json.decode(case_to_json(entry.record.case))
    told = []
    for part in ("model", "quantization", "adapter", "workload"):
        fields = parts.get(part)
        if isinstance(fields, dict):
            text = ", ".join(
                f"{name} {value if isinstance(value, str) else _short(value)}" for name, value in fields.items()
            )
            told.append((part, plain(text or "as by default", _LONGEST)))
    return told


def _short(value: Any) -> str:
    return plain(msgspec.json.encode(value).decode(), 120)


def _metric(entry: Entry, name: str, verdict: MetricVerdict | None) -> dict[str, str]:
    metric = entry.record.metrics[name]
    spread = entry.spread(name) if metric.noise != "exact" else None
    told = (
        ""
        if spread is None
        else f"{sizes.pair(spread.low, spread.high, metric.unit)} in {spread.count}".replace("→", "to")
    )
    return {
        "name": plain(name, 60),
        "value": plain(sizes.quantity(metric.value, metric.unit), 60),
        "spread": plain(told, 80),
        "old": "" if verdict is None or verdict.old is None else plain(sizes.quantity(verdict.old, metric.unit), 60),
        "change": "" if verdict is None or not verdict.ratio else sizes.percent(verdict.ratio),
        "verdict": "" if verdict is None else str(verdict.verdict),
        "tone": "" if verdict is None else tone(str(verdict.verdict)),
    }
