"""Make one case from another by naming only what differs.

Knows where each field of a case lives; refuses names that are nowhere or in several places.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hpc_core.case.errors import SpecError

if TYPE_CHECKING:
    from hpc_core.case.case import Case

__all__ = ["changed", "varied"]

_PARTS = ("model", "quantization", "adapter", "workload")
_INNER = ("data", "feed")
"""Parts of a workload, for those that have them."""


def varied(case: Case, variant: str, changes: dict[str, Any]) -> Case:
    """The case `<shape>/<variant>` that differs from `case` by `changes`; see `Case.vary`.

    Raises:
        SpecError: an unknown or ambiguous field, or nothing changed.
    """
    new = changed(case, variant, changes)
    if new.digest == case.digest and (new.timeout_s, new.limits) == (case.timeout_s, case.limits):
        raise SpecError(f"{new.id} runs exactly what {case.id} runs: a variant must change something.")
    return new


def changed(case: Case, variant: str, changes: dict[str, Any]) -> Case:
    """As `varied`, for changes that may also say what is so already.

    Raises:
        SpecError: an unknown or ambiguous field.
    """
    values = {name: getattr(case, name) for name in case.__struct_fields__}
    nested: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        place, field = _place(case, name)
        if place == "":
            values[field] = value
        else:
            nested.setdefault(place, {})[field] = value
    for name in _INNER:
        inner = nested.pop(name, None)
        if inner is not None:
            nested.setdefault("workload", {})[name] = _replaced(getattr(case.workload, name), inner)
    arguments = nested.pop("arguments", None)
    if arguments is not None:
        nested.setdefault("workload", {})["arguments"] = _arguments(case) | arguments
    for part, fields in nested.items():
        values[part] = _replaced(values[part], fields)
    values["id"] = f"{case.id.partition('/')[0]}/{variant}"
    return type(case)(**values)


def _arguments(case: Case) -> dict[str, Any]:
    """Those that a callable's case gives to its factory; which others the factory knows cannot be seen from here."""
    return dict(getattr(case.workload, "arguments", {}))


def _replaced(part: Any, fields: dict[str, Any]) -> Any:
    # Through the constructor, so that the new value is checked like any other.
    return type(part)(**{name: getattr(part, name) for name in part.__struct_fields__} | fields)


def _place(case: Case, name: str) -> tuple[str, str]:
    """The part and the field that a change names; part "" is the case itself."""
    parts = {part: getattr(case, part).__struct_fields__ for part in _PARTS if getattr(case, part) is not None}
    for name_of_part in _INNER:
        if hasattr(case.workload, name_of_part):
            parts[name_of_part] = getattr(case.workload, name_of_part).__struct_fields__
    if case.kind == "callable":
        parts["arguments"] = tuple(_arguments(case))
    if name in case.__struct_fields__ and name not in ("id", "seed"):
        return "", name
    places = [(part, name) for part, fields in parts.items() if name in fields]
    for part, fields in parts.items():
        if name.startswith(f"{part}_") and name.removeprefix(f"{part}_") in fields:
            places.append((part, name.removeprefix(f"{part}_")))
    if name == "seed":
        places = [("", "seed")]  # the case's own; the others are model_seed and data_seed
    if len(places) == 1:
        return places[0]
    if not places:
        known = sorted({field for fields in parts.values() for field in fields})
        raise SpecError(f"{case.id} has no field {name!r} to vary. It has: {', '.join(known)}.")
    owners = ", ".join(f"{part}_{field}" for part, field in places)
    raise SpecError(f"{name!r} is ambiguous for {case.id}: say one of {owners}.")
