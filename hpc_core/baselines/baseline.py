"""What a baseline is, and what may be found in its place."""

from __future__ import annotations

from typing import Literal

import msgspec

from hpc_core.case.case import SCHEMA, Case
from hpc_core.record.record import Machine, Metric, Record


class Stored(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of what is stored or found: immutable, with every field written out."""


class Accepted(Stored, frozen=True, kw_only=True):
    """Why these numbers were accepted, when, and for which code."""

    reason: str
    at: str
    """ISO 8601, UTC."""
    commit: str | None
    dirty: bool | None


class Baseline(Stored, frozen=True, kw_only=True):
    """The accepted numbers of one case on one machine: gated metrics only."""

    schema: int
    case: str
    """The case's id, `<shape>/<variant>`."""
    digest: str
    spec: Case
    machine: Machine
    stack: dict[str, str]
    settings: dict[str, str] | None = None
    """As in `Circumstances.settings`."""
    python: str
    accepted: Accepted
    metrics: dict[str, Metric]


class Missing(Stored, frozen=True, kw_only=True):
    """There is no baseline of this case for this machine."""

    path: str
    elsewhere: tuple[str, ...] = ()
    """Other machines' keys that have one."""


class Damaged(Stored, frozen=True, kw_only=True):
    """There is a file, but `accept` did not write it."""

    path: str
    reason: str


class OlderSchema(Stored, frozen=True, kw_only=True):
    """An intact file of another schema, older or newer."""

    path: str
    found: int
    known: int = SCHEMA


Lookup = Baseline | Missing | Damaged | OlderSchema


class Change(Stored, frozen=True, kw_only=True):
    """One metric before and after an acceptance, in `unit`; None where it is absent."""

    metric: str
    old: float | int | None
    new: float | int | None
    unit: str


class Acceptance(Stored, frozen=True, kw_only=True):
    """What `accept` did."""

    path: str
    action: Literal["created", "updated", "unchanged"]
    changes: tuple[Change, ...]
    left_out: tuple[str, ...] = ()
    """A text for each time that was not accepted, since other programs disturbed it: "step_s (5 of 5 waited for a core)"."""


def gated_metrics(record: Record) -> dict[str, Metric]:
    """Return the metrics of a record that a baseline holds and the gate judges, by name."""
    return {name: metric for name, metric in sorted(record.metrics.items()) if metric.gated}


def proves_nothing(name: str, metric: Metric) -> str | None:
    """Return why this value cannot be a measurement, or None: nothing is negative, and no time or memory peak is zero.

    A zero count (no copies) or a zero category (no KV cache) is a legitimate value.
    """
    if metric.value < 0:
        return f"{name} is {metric.value} {metric.unit}, below zero"
    peak = name.startswith("peak_") and metric.unit == "bytes"
    if metric.value == 0 and (metric.noise != "exact" or peak):
        return f"{name} is 0 {metric.unit}, and zero proves nothing"
    return None
