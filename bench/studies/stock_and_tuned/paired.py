"""Cases that differ in nothing but the engine: found by what they run, whatever they are called."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from hpc_core.case.case import Case
from hpc_core.case.limits import GiB
from hpc_core.case.workloads import ENGINE_FIELDS

__all__ = ["are_twins", "changed_work", "twins_of", "work_of"]


def work_of(case: Case) -> bytes | None:
    """What the case does, whatever its id and limits and however an engine does it, as canonical JSON. None for a step of the user's own.

    Two cases are twins if this is equal: the same model, adapter, data, batch and lengths.
    """
    fields = ENGINE_FIELDS.get(case.kind)
    if fields is None:
        return None
    told = msgspec.to_builtins(case)
    for name in ("id", "timeout_s", "limits"):
        told.pop(name, None)
    for name in fields:
        told["workload"].pop(name, None)
    return msgspec.json.encode(told, order="sorted")


def are_twins(stock: Case, other: Case) -> bool:
    """Whether `stock` runs by the libraries' own path what `other` runs by an engine of ours."""
    return _engine(stock) == "stock" and _engine(other) not in ("stock", None) and work_of(stock) == work_of(other)


def twins_of(cases: Iterable[Case]) -> list[tuple[Case, tuple[Case, ...]]]:
    """Each stock case that has twins, with them, in the order given."""
    every = list(cases)
    found = [(case, tuple(other for other in every if are_twins(case, other))) for case in every]
    return [(case, others) for case, others in found if others]


def changed_work(case: Case) -> str:
    """What the engine was told beside its name, as "loss=chunked, graph"; "" for a stock case."""
    workload = case.workload
    told = []
    for field in msgspec.structs.fields(workload):
        value = getattr(workload, field.name)
        if field.name == "engine" or field.name not in ENGINE_FIELDS.get(case.kind, ()) or value == field.default:
            continue
        if field.name == "budget_bytes":
            told.append(f"budget={value / GiB:g} GiB")
        else:
            told.append(field.name if value is True else f"{field.name}={value}")
    return ", ".join(told)


def _engine(case: Case) -> str | None:
    engine: str | None = getattr(case.workload, "engine", None)
    return engine
