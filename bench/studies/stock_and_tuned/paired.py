"""Find paired cases: they do the same work, and only the engine differs, whatever their names."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from hpc_core.case.case import Case
from hpc_core.case.limits import GiB
from hpc_core.case.workloads import ENGINE_FIELDS

__all__ = ["are_paired", "changed_work", "paired_cases", "work_of"]


def work_of(case: Case) -> bytes | None:
    """Return the case's work as canonical JSON, without its id, limits and engine; None for a user's own step.

    Cases with equal work have the same model, adapter, data, batch and lengths.
    """
    fields = ENGINE_FIELDS.get(case.kind)
    if fields is None:
        return None
    work = msgspec.to_builtins(case)
    for name in ("id", "timeout_s", "limits"):
        work.pop(name, None)
    for name in fields:
        work["workload"].pop(name, None)
    return msgspec.json.encode(work, order="sorted")


def are_paired(stock: Case, other: Case) -> bool:
    """Return whether `stock` is a stock case, and `other` does the same work with one of our engines."""
    return _engine(stock) == "stock" and _engine(other) not in ("stock", None) and work_of(stock) == work_of(other)


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
        if field.name == "engine" or field.name not in ENGINE_FIELDS.get(case.kind, ()) or value == field.default:
            continue
        if field.name == "budget_bytes":
            switches.append(f"budget={value / GiB:g} GiB")
        else:
            switches.append(field.name if value is True else f"{field.name}={value}")
    return ", ".join(switches)


def _engine(case: Case) -> str | None:
    engine: str | None = getattr(case.workload, "engine", None)
    return engine
