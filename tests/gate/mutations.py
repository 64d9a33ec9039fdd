"""Changes of one metric of a sound record or baseline that must never pass: worse, missing, impossible, or another quantity."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from typing import Any

import msgspec

from hpc_core.baselines.baseline import gated_metrics
from hpc_core.gate.tolerance import tolerance
from hpc_core.record.record import Record

Values = dict[str, Any]
"""A metric as plain values."""


def _scaled(metric: Values, factor: float) -> Values:
    whole = isinstance(metric["value"], int)
    changed = {"value": round(metric["value"] * factor) if whole else metric["value"] * factor}
    if metric.get("samples"):
        changed["samples"] = [sample * factor for sample in metric["samples"]]
    return metric | changed


def _worse(metric: Values, draw: random.Random) -> Values:
    """A value that is worse by at least a third, and by more than any allocator rounds."""
    higher = metric["better"] == "lower" or (metric["better"] == "same" and draw.random() < 0.5)
    factor = draw.uniform(1.34, 50) if higher else draw.uniform(0.01, 0.66)
    changed = _scaled(metric, factor)
    step = 2**23 if metric["unit"] == "bytes" else 1
    if isinstance(changed["value"], int):
        changed["value"] += step if higher else -step
    return changed


def _other(field: str, choices: list[Any]) -> Callable[[Values, random.Random], Values]:
    def change(metric: Values, draw: random.Random) -> Values:
        return metric | {field: draw.choice([choice for choice in choices if choice != metric.get(field)])}

    return change


IN_RECORD: dict[str, Callable[[Values, random.Random], Values | None]] = {
    "worse": _worse,
    "missing": lambda metric, draw: None,
    "below zero": lambda metric, draw: metric | {"value": -draw.randint(1, 2**40)},
    "not gated": lambda metric, draw: metric | {"gated": False},
    "another unit": _other("unit", ["bytes", "1", "s", "GiB", "FLOP", "tokens/s", ""]),
    "another noise class": _other("noise", ["exact", "busy", "wall"]),
    "another direction": _other("better", ["lower", "higher", "same"]),
    "no longer a number": _other("value", ["12", None, True, [1], {}, "NaN", 10**400, ""]),
}
"""Changes of a record's metric, by name: its new values, or None to remove it."""

IN_BASELINE: dict[str, Callable[[Values, random.Random], Values | None]] = {
    "better than what runs": lambda metric, draw: (
        _worse(metric | {"better": {"lower": "higher", "higher": "lower"}.get(metric["better"], "same")}, draw)
        | {"better": metric["better"]}
    ),
    "below zero": IN_RECORD["below zero"],
    "not gated": IN_RECORD["not gated"],
    "another unit": IN_RECORD["another unit"],
    "another noise class": IN_RECORD["another noise class"],
    "another direction": IN_RECORD["another direction"],
    "no longer a number": IN_RECORD["no longer a number"],
}
"""Changes of a baseline's metric, with a checksum that fits."""


BARELY = "barely worse"
"""The change of a record's exact metric by one more than is allowed."""


def changed_record(record: Record, kind: str, draw: random.Random) -> tuple[str, bytes]:
    """Return the name of the metric that was changed, and the record as JSON."""
    content = msgspec.to_builtins(record)
    if kind == BARELY:
        name = draw.choice([name for name, metric in sorted(gated_metrics(record).items()) if metric.noise == "exact"])
        metric = record.metrics[name]
        step = math.floor(tolerance(name, metric, record.case.limits.named().get(name)).distance) + 1
        content["metrics"][name]["value"] += -step if metric.better == "higher" else step
        return name, json.dumps(content).encode()
    gated = gated_metrics(record)
    names = [name for name, metric in sorted(gated.items()) if not _may(kind, metric.noise, metric.unit)]
    return _change(content["metrics"], names, IN_RECORD[kind], draw), json.dumps(content).encode()


def changed_metrics(metrics: dict[str, Values], kind: str, draw: random.Random) -> str:
    """Change one of a baseline's metrics, and return its name."""
    names = [name for name, metric in sorted(metrics.items()) if not _may(kind, metric["noise"], metric["unit"])]
    return _change(metrics, names, IN_BASELINE[kind], draw)


def _may(kind: str, noise: str, unit: str) -> bool:
    """Return whether a change may pass: what moves with the host is judged by its sessions, and energy cannot always be measured."""
    return noise == "wall" and (kind in ("worse", "better than what runs") or (kind == "missing" and unit == "J"))


def _change(
    metrics: dict[str, Values],
    names: list[str],
    change: Callable[[Values, random.Random], Values | None],
    draw: random.Random,
) -> str:
    name = draw.choice(names)
    values = change({"gated": True, **metrics[name]}, draw)
    if values is None:
        del metrics[name]
    else:
        metrics[name] = values
    return name
