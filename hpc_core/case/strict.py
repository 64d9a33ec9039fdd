"""What every specification shares: immutable, typed in Python as in JSON, and a canonical form that leaves defaults out.

Knows no field of any specification.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import msgspec

from hpc_core.case.errors import SpecError

__all__ = ["Strict", "check_types", "essence", "refuse"]


def refuse(condition: bool, message: str) -> None:
    """Raise SpecError with this message where the condition holds."""
    if condition:
        raise SpecError(message)


class Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of every specification: immutable, keyword-only, strict about unknown keys."""


@functools.cache
def _fields(kind: type[msgspec.Struct]) -> tuple[msgspec.structs.FieldInfo, ...]:
    return msgspec.structs.fields(kind)


def check_types(spec: Strict) -> None:
    """Hold a value made in Python to the types that JSON is held to, so that it equals its JSON: 16 becomes 16.0, a list a tuple."""
    for field in _fields(type(spec)):
        value = getattr(spec, field.name)
        try:
            typed = msgspec.convert(value, field.type)
        except (msgspec.ValidationError, RecursionError) as error:
            raise SpecError(f"{type(spec).__name__}({field.name}={value!r}): {error}") from error
        if isinstance(typed, float):
            refuse(not math.isfinite(typed), f"{type(spec).__name__}({field.name}={value!r}): must be finite.")
            typed = typed or 0.0  # -0.0 equals 0.0 but prints, and digests, differently
        if typed is not value and not isinstance(typed, dict):
            msgspec.structs.force_setattr(spec, field.name, typed)


def essence(value: Any) -> Any:
    """Builtins of a specification without what equals its default. msgspec's own `omit_defaults` asks for identity, not equality."""
    if isinstance(value, msgspec.Struct):
        tag = value.__struct_config__.tag
        said = {} if tag is None else {str(value.__struct_config__.tag_field): tag}
        for field in _fields(type(value)):
            content = getattr(value, field.name)
            default = field.default_factory() if field.default_factory is not msgspec.NODEFAULT else field.default
            if content != default:
                said[field.name] = essence(content)
        return said
    return list(value) if isinstance(value, tuple) else value
