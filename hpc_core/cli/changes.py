"""What a person changes on the command line: `batch=8` and `batch=1,2,4` as changes of a case, "1GiB" as bytes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from hpc_core.case.case import Case, changed
from hpc_core.case.errors import SpecError

__all__ = ["bytes_said", "changes_said", "sweep_said", "with_changes"]

_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_SIZE = re.compile(r"(?P<number>[0-9]{1,15}(\.[0-9]{1,9})?) ?(?P<unit>[a-z]*)", re.IGNORECASE)
_NOT_IN_AN_ID = re.compile(r"[^a-z0-9.+_-]+")
_LONGEST_ID = 60


def changes_said(said: Sequence[str]) -> dict[str, Any]:
    """Changes by field, from texts such as "batch=8"; a value is JSON where it can be read as such, else text.

    Raises:
        SpecError: a text without "=", or a field that is named twice.
    """
    changes: dict[str, Any] = {}
    for text in said:
        field, value = _halves("--set", text)
        if field in changes:
            raise SpecError(f"--set {field} is said twice: {changes[field]!r} and {value!r}.")
        changes[field] = _value(value)
    return changes


def sweep_said(text: str) -> tuple[str, list[Any]]:
    """A field and its values, from a text such as "batch=1,2,4" or 'targets=[["q_proj"],["q_proj","v_proj"]]'.

    Raises:
        SpecError: a text without "=", or without a value.
    """
    field, said = _halves("--sweep", text)
    whole = _value(said)
    values = whole if isinstance(whole, list) else [_value(part.strip()) for part in said.split(",") if part.strip()]
    if not values:
        raise SpecError(f"--sweep {text}: says no value. Say several: --sweep {field}=1,2,4.")
    return field, values


def with_changes(case: Case, changes: dict[str, Any]) -> Case:
    """The case with these changes, under an id that says them; the case itself where nothing changes.

    Raises:
        SpecError: an unknown or ambiguous field, a wrong value, or a contradiction.
    """
    if not changes:
        return case
    variant = case.id.partition("/")[2]
    said = "".join(f"+{name}-{_plain(value)}" for name, value in changes.items())
    found = changed(case, f"{variant}{said}"[:_LONGEST_ID], changes)
    return case if found.digest == case.digest else found


def bytes_said(option: str, text: str) -> int:
    """Bytes, from "1GiB", "512 MiB" or "0".

    Raises:
        SpecError: a text that is no size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or match["unit"].lower() not in _UNITS:
        raise SpecError(f"{option} {text!r} is no size: say 1GiB, 512MiB or a number of bytes.")
    return round(float(match["number"]) * _UNITS[match["unit"].lower()])


def _halves(option: str, text: str) -> tuple[str, str]:
    field, equals, value = text.partition("=")
    if not equals or not field.strip():
        raise SpecError(f"{option} {text!r} says no field: say {option} batch=8.")
    return field.strip(), value.strip()


def _value(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text


def _plain(value: Any) -> str:
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return _NOT_IN_AN_ID.sub("-", text.lower()).strip("-")
