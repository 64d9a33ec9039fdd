"""One self-contained HTML page: table, causes, charts, details. It loads nothing from a network and trusts no record.

Every value passes jinja2's autoescape; data of charts is JSON in a block that is not run. Styles and scripts are named by their hash in a
content security policy, so nothing else runs even if a value slipped through. Needs jinja2, Altair and vl-convert (which brings Vega).
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import vl_convert
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from hpc_core.case.case import case_to_json
from hpc_core.gate.verdict import MetricVerdict
from hpc_core.record import units
from hpc_core.record.plain import plain
from hpc_core.record.version import __version__
from hpc_core.report import charts, charts_memory
from hpc_core.report.chart_parts import Panel
from hpc_core.report.entry import BUSY, NOTHING, WALL, Entry, judged_line
from hpc_core.report.lines import time_notes
from hpc_core.report.terminal import caption

LARGEST_BYTES = 2_000_000
"""Of the whole page without Vega."""
VEGA_BYTES = 1_000_000
"""What Vega may add to a page with charts."""
_DETAILS_BYTES = (1_000_000, 400_000, 0)
"""What details may take, tried in this order until the page is small enough."""
_MOST_ROWS = 1000
_MOST_CARDS = 40
_MOST_MACHINES = 8
_MOST_TIMELINES = 8
_MOST_METRICS = 60
_MOST_CAUSES = 30
_LONGEST = 300
_LONGEST_CAUSE = 1500
"""Of a line of the cause, which names categories, modules and operators: cut, it says nothing."""
_ROW_BYTES = 110
"""About what a metric's row takes on the page."""
_TONES = {"PASS": "good", "OK": "good", "IMPROVED": "better", "REGRESSED": "bad", "INVALID": "bad", "BROKEN": "bad"}
_FIT = {"type": "fit-x", "contains": "padding"}
_HERE = Path(__file__).parent


def page(entries: Sequence[Entry], notes: Sequence[str] = ()) -> str:
    """Return the page as text. Where it would be too large, it leaves out details, then rows, and says so."""
    shown = entries[:_MOST_ROWS]
    attention = sorted((entry for entry in shown if entry.needs_attention), key=_severity)
    rows = [_row(entry) for entry in shown]
    is_judged = any(entry.judgement is not None for entry in entries)
    machines, specs = _machines(shown)
    scripts = [_vega(), _asset("charts.js")] if specs else []
    style, script = _asset("page.css"), _asset("page.js")
    content: dict[str, Any] = {
        "version": __version__,
        "style": style,
        "scripts": [*scripts, script],
        "policy": _policy([style], [*scripts, script]),
        "rows": rows,
        # Columns of numbers that some case has.
        "columns": list(dict.fromkeys(name for row in rows for name, text, _ in row["cells"] if text != NOTHING))
        or ["peak memory"],
        # So many of them fit a phone next to case, verdict and change.
        "narrow": 1 if is_judged else 2,
        "is_judged": is_judged,
        "cards": [_card(entry) for entry in attention[:_MOST_CARDS]],
        "more_cards": max(0, len(attention) - _MOST_CARDS),
        "machines": machines,
        "specs": specs,
        "left_out": len(entries) - len(shown),
        "judged": judged_line([entry.row for entry in entries]) or "",
        "notes": [*(plain(note, _LONGEST) for note in time_notes(entry.row for entry in entries)), *notes][:20],
    }
    template = _environment().get_template("page.html.jinja")
    most = LARGEST_BYTES + sum(len(each) for each in scripts)
    text = ""
    for budget in _DETAILS_BYTES:
        text = template.render(content, details=_details_within(shown, budget))
        if len(text.encode()) <= most:
            break
    return text


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


@cache
def _asset(name: str) -> Markup:
    """Return a file of this folder, which is ours and needs no escaping."""
    return Markup((_HERE / name).read_text(encoding="utf-8"))  # noqa: S704


@cache
def _vega() -> Markup:
    """Return Vega, Vega-Lite and vega-embed as one script."""
    snippet = "window.vegaEmbed = vegaEmbed;"
    return Markup(vl_convert.javascript_bundle(snippet))  # noqa: S704


def _policy(styles: Sequence[str], scripts: Sequence[str]) -> str:
    """Return a policy under which nothing is loaded, sent or run but these texts."""
    return (
        f"default-src 'none'; style-src {' '.join(map(_hash, styles))}; script-src {' '.join(map(_hash, scripts))}; "
        "base-uri 'none'; form-action 'none'"
    )


@cache
def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _severity(entry: Entry) -> int:
    """Return a key that sorts the gravest verdict first, and before it what has no verdict."""
    return -7 if entry.judgement is None else -entry.judgement.verdict.severity


def _tone(verdict: str) -> str:
    """Return a class of the style sheet: good, better, bad or open."""
    return _TONES.get(verdict, "open")


def _row(entry: Entry) -> dict[str, Any]:
    """Return a row of the table: what is shown, and the numbers to sort by."""
    row = entry.row
    shape, _, variant = entry.case.partition("/")
    leading = None if entry.judgement is None else next(iter(entry.judgement.metrics), None)
    return {
        "anchor": entry.anchor,
        "case": entry.case,
        "shape": shape,
        "variant": variant,
        "machine": entry.machine,
        "verdict": row.verdict,
        "tone": _tone(row.verdict),
        "severity": -1 if entry.judgement is None else entry.judgement.verdict.severity,
        "cells": [
            ("peak memory", row.peak, entry.value("peak_bytes")),
            ("GPU-busy", row.busy, entry.value(*BUSY)),
            ("wall", row.wall, entry.value("step_s", "query_s")),
            ("tokens/s", row.tokens_per_s, entry.value("tokens_per_s")),
            ("of ceiling", plain(row.share, 40), entry.value("mfu", "mbu")),
        ],
        "change": plain(row.change, 80),
        "ratio": None if leading is None else leading.ratio,
    }


def _card(entry: Entry) -> dict[str, Any]:
    """Return a case that needs attention, with its cause and next step."""
    judgement, failure = entry.judgement, entry.record.failure
    lines: list[str] = []
    if failure is not None:
        headline = f"{failure.kind} in {failure.phase}: {failure.message}"
    elif judgement is None:
        headline = " ".join(entry.record.reasons)
    else:
        headline = judgement.headline
        lines = [judgement.reason, *entry.grown, *(f"moved: {package}" for package in judgement.moved)]
    details = () if entry.cause is None else entry.cause.details[:_MOST_CAUSES]
    return {
        "anchor": entry.anchor,
        "case": entry.case,
        "verdict": entry.row.verdict,
        "tone": _tone(entry.row.verdict),
        "headline": plain(headline, _LONGEST),
        "why": _why(entry),
        "more": [plain(line, _LONGEST_CAUSE) for line in details],
        "lines": [plain(line, _LONGEST) for line in lines if line != headline][:8],
        "step": "" if judgement is None else plain(entry.row.commands.in_step(judgement.next_step), _LONGEST),
    }


def _why(entry: Entry) -> list[str]:
    """Return the two lines of the cause."""
    return [] if entry.cause is None else [plain(line, _LONGEST_CAUSE) for line in entry.cause.lines]


def _machines(entries: Sequence[Entry]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return a section for each machine, predictions last, and the specifications of all charts by number."""
    by_machine: dict[str, list[Entry]] = {}
    for entry in sorted(entries, key=lambda each: (each.is_predicted, each.machine)):
        by_machine.setdefault(entry.machine, []).append(entry)
    sections: list[dict[str, Any]] = []
    specs: list[dict[str, Any]] = []
    for number, own in enumerate(list(by_machine.values())[:_MOST_MACHINES]):
        figures = []
        for panel in _panels(own):
            figures.append({"id": len(specs), "title": panel.title})
            specs.append(panel.chart.properties(width="container", autosize=_FIT).to_dict(validate=False))
        captions = list(dict.fromkeys(plain(caption(entry.record), 600) for entry in own))
        sections.append(
            {
                "id": f"m{number}",
                "key": own[0].machine,
                "name": plain(own[0].record.circumstances.machine.name, 80),
                "is_predicted": own[0].is_predicted,
                "count": len(own),
                "captions": captions[:3],
                "more_captions": max(0, len(captions) - 3),
                "figures": figures,
            }
        )
    return sections, specs


def _panels(entries: Sequence[Entry]) -> list[Panel]:
    drawn = [entry for entry in entries if entry.metrics]
    panels = [panel for panels_of in charts.PICTURES.values() for panel in panels_of(drawn)]
    return [
        *panels,
        *charts.own_steps(drawn),
        *charts.sessions(drawn),
        *charts_memory.timelines(entries)[:_MOST_TIMELINES],
    ]


def _details_within(entries: Sequence[Entry], most_bytes: int) -> list[dict[str, Any]]:
    """Return the details of as many cases as fit about so many bytes; those that need attention come first."""
    found, size = [], 0
    for entry in sorted(entries, key=lambda each: not each.needs_attention):
        one = _details(entry)
        size += 1500 + _ROW_BYTES * len(one["metrics"]) + sum(map(len, one["why"]))
        if size > most_bytes:
            break
        found.append(one)
    return sorted(found, key=lambda each: (each["machine"], each["case"]))


def _details(entry: Entry) -> dict[str, Any]:
    record = entry.record
    verdicts = {} if entry.judgement is None else {each.metric: each for each in entry.judgement.metrics}
    chosen = sorted(name for name in record.metrics if name in verdicts or record.metrics[name].gated)
    shown = (entry.name_of(*WALL), entry.name_of("tokens_per_s"), entry.name_of("reserved_bytes"))
    names = list(dict.fromkeys([*chosen, *(name for name in shown if name)]))[:_MOST_METRICS]
    families = sorted(record.kernel_families.items(), key=lambda each: -each[1].seconds)[:12]
    total = sum(max(0.0, family.seconds) for _, family in families)
    makers = sorted(record.makers_at_peak.items(), key=lambda each: -each[1])[:8]
    return {
        "anchor": entry.anchor,
        "case": entry.case,
        "machine": entry.machine,
        "verdict": entry.row.verdict,
        "tone": _tone(entry.row.verdict),
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
                "share": f"{100 * max(0.0, family.seconds) / total:.0f} %" if total else NOTHING,
                "seconds": units.quantity(family.seconds, "s"),
                "kernels": f"{family.kernels:,}",
            }
            for name, family in families
        ],
        "makers": [{"name": plain(name, 80), "bytes": units.quantity(size, "bytes")} for name, size in makers],
        "notes": [plain(note, _LONGEST) for note in record.circumstances.notes[:4]],
    }


def _spec(entry: Entry) -> list[tuple[str, str]]:
    """Return the fields that the case states, by part."""
    parts = msgspec.json.decode(case_to_json(entry.record.case))
    found = []
    for part in ("model", "quantization", "adapter", "workload"):
        fields: Mapping[str, Any] | None = parts.get(part)
        if isinstance(fields, dict):
            values = ((name, value if isinstance(value, str) else _short(value)) for name, value in fields.items())
            text = ", ".join(f"{name} {value}" for name, value in values)
            found.append((part, plain(text or "defaults", _LONGEST)))
    return found


def _short(value: Any) -> str:
    return plain(msgspec.json.encode(value).decode(), 120)


def _metric(entry: Entry, name: str, verdict: MetricVerdict | None) -> dict[str, str]:
    metric = entry.record.metrics[name]
    spread = entry.spread(name) if metric.noise != "exact" else None
    text = ""
    if spread is not None:
        text = f"{units.pair(spread.low, spread.high, metric.unit)} in {spread.count}".replace("→", "to")
    return {
        "name": plain(name, 60),
        "value": plain(units.quantity(metric.value, metric.unit), 60),
        "spread": plain(text, 80),
        "old": "" if verdict is None or verdict.old is None else plain(units.quantity(verdict.old, metric.unit), 60),
        "change": "" if verdict is None or not verdict.ratio else units.percent(verdict.ratio),
        "verdict": "" if verdict is None else str(verdict.verdict),
        "tone": "" if verdict is None else _tone(str(verdict.verdict)),
    }
