"""Find paired cases: they do the same work, and only the engine differs, whatever their names."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from hpc_core.case.case import Case
from hpc_core.case.limits import GiB
from hpc_core.case.workloads import ENGINE_FIELDS

_CACHE = ("cache", "compiled")
"""Fields by which transformers itself generates in another way: with a static cache, by a compiled forward."""


def work_of(case: Case) -> bytes | None:
    """Return the case's work as canonical JSON, without its id, limits and engine; None for a user's own step.

    Cases with equal work have the same model, adapter, data, batch and lengths.
    """
    if case.kind not in ENGINE_FIELDS:
        return None
    work = msgspec.to_builtins(case)
    for name in ("id", "timeout_s", "limits"):
        work.pop(name, None)
    for name in _fields(case):
        work["workload"].pop(name, None)
    return msgspec.json.encode(work, order="sorted")


def are_paired(stock: Case, other: Case) -> bool:
    """Return whether `stock` is a stock case, and `other` does the same work with one of our engines or a compiled forward."""
    return _way(stock) == "stock" and _way(other) not in ("stock", None) and work_of(stock) == work_of(other)


def paired_cases(cases: Iterable[Case]) -> list[tuple[Case, tuple[Case, ...]]]:
    """Return each stock case that has paired cases, with these, in the order given."""
    every = list(cases)
    found = [(case, tuple(other for other in every if are_paired(case, other))) for case in every]
    return [(case, others) for case, others in found if others]


def changed_work(case: Case) -> str:
    """Return the engine's switches, such as "loss=chunked, graph"; "" for a stock case."""
    workload = case.workload
    switches = []
    for field in msgspec.structs.fields(workload):
        value = getattr(workload, field.name)
        if field.name == "engine" or field.name not in _fields(case) or value == field.default:
            continue
        if field.name == "budget_bytes":
            switches.append(f"budget={value / GiB:g} GiB")
        else:
            switches.append(field.name if value is True else f"{field.name}={value}")
    return ", ".join(switches)


def _fields(case: Case) -> tuple[str, ...]:
    return (*ENGINE_FIELDS.get(case.kind, ()), *_CACHE)


def _way(case: Case) -> str | None:
    """Return the engine, and the cache where it is not the default; None for a step of the user's own."""
    engine: str | None = getattr(case.workload, "engine", None)
    cache = getattr(case.workload, "cache", "dynamic")
    return engine if cache == "dynamic" else f"{engine}, {cache} cache"
