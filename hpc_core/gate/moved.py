"""What differs around two runs: packages of the stack, fields of the case. Says what moved, not whether it matters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from hpc_core.case.case import Case, case_to_json

__all__ = ["case_changes", "packages_moved", "time_incomparable"]

_NOT_RUN = ("id", "limits", "timeout_s")
_GIVEN = "given"


def packages_moved(old: Mapping[str, str], new: Mapping[str, str]) -> tuple[str, ...]:
    """Packages whose version moved, by name: "transformers 5.23.0 → 5.24.0", "peft absent → 0.21.0"."""
    return tuple(
        f"{name} {old.get(name, 'absent')} → {new.get(name, 'absent')}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    )


def time_incomparable(old: Mapping[str, str], new: Mapping[str, str]) -> tuple[str, ...]:
    """Moves of driver or CUDA, CUDA as torch was built for it included, across which a time means nothing."""
    return packages_moved(_below_torch(old), _below_torch(new))


def _below_torch(stack: Mapping[str, str]) -> dict[str, str]:
    below = {name: stack[name] for name in ("driver", "cuda") if name in stack}
    build = stack.get("torch", "").partition("+")[2]
    return below | ({"torch's build": build} if build else {})


def case_changes(old: Case, new: Case) -> tuple[str, ...]:
    """Fields that differ in what runs: "adapter.rank 8 → 16". A field at its default reads "default"."""
    before, after = (_flat(msgspec.json.decode(case_to_json(case))) for case in (old, new))
    return tuple(
        f"{name} {before.get(name) or _unsaid(after[name])} → {after.get(name) or _unsaid(before[name])}"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name) and name.partition(".")[0] not in _NOT_RUN
    )


def _unsaid(other: str) -> str:
    """How a field reads that only the other side states: a part is then missing, a value has its default."""
    return "none" if other == _GIVEN else "default"


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Every stated field by its dotted name, as text; a part itself reads "given", so that an empty one is seen."""
    flat: dict[str, str] = {}
    for name, value in content.items():
        flat[prefix + name] = _GIVEN if isinstance(value, dict) else repr(value)
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
    return flat
