"""Cases that differ in nothing but the engine: found by what they run, whatever they are called."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from hpc_core.spec import Case, FinetuneSpec, GenerateSpec
from hpc_core.workloads import ENGINE_FIELDS

__all__ = ["are_twins", "changed_work", "stock_work", "twins_of"]


def stock_work(case: Case) -> Case | None:
    """The case with every field that belongs to an engine at its default, its id and limits replaced; None for a step of the user's own.

    Two cases are twins if this is equal: the same model, adapter, data, batch and lengths.
    """
    workload = case.workload
    if not isinstance(workload, FinetuneSpec | GenerateSpec):
        return None
    defaults = {field.name: field.default for field in msgspec.structs.fields(workload)}
    stock = msgspec.structs.replace(workload, **{name: defaults[name] for name in ENGINE_FIELDS[case.kind]})
    plain: dict[str, Any] = {"id": "same/work", "timeout_s": 300.0, "limits": type(case.limits)(), "workload": stock}
    return msgspec.structs.replace(case, **plain)


def are_twins(stock: Case, other: Case) -> bool:
    """Whether `stock` runs by the libraries' own path what `other` runs by an engine of ours."""
    return _engine(stock) == "stock" != _engine(other) and stock_work(stock) == stock_work(other)


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
        told.append(field.name if value is True else f"{field.name}={value}")
    return ", ".join(told)


def _engine(case: Case) -> str | None:
    engine: str | None = getattr(case.workload, "engine", None)
    return engine
