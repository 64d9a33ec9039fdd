"""Whether a value can be compared with an accepted one: what moved between the two runs, and what must not have.

The gate and A/B both ask here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from hpc_core.case.case import Case, case_to_json
from hpc_core.gate.verdict import Verdict
from hpc_core.record import units as sizes
from hpc_core.record.plain import plain
from hpc_core.record.record import Metric

_NOT_RUN = ("id", "limits", "timeout_s")
_GIVEN = "given"


class Incomparable(msgspec.Struct, frozen=True):
    """Why two values of a metric cannot be compared, and the verdict that follows."""

    verdict: Verdict
    reason: str
    judged: bool = True
    """False: only this metric is left out; the case is judged by its other ones."""


class Place(msgspec.Struct, frozen=True):
    """Where a value was measured."""

    machine: str
    stack: Mapping[str, str]
    settings: Mapping[str, str] | None = None
    """As in `Circumstances.settings`."""
    python: str = ""


def incomparable(name: str, old: Metric, new: Metric, places: tuple[Place, Place] | None = None) -> Incomparable | None:
    """Return why two values cannot be compared; None if they can.

    `places` are those of the old and of the new value. Without them both are of one session on one machine, as in A/B: then
    only what the metric is must agree.
    """
    must_agree = ("unit", "noise", "better") if places is None else ("unit", "noise", "better", "depends_on")
    differing = [field for field in must_agree if getattr(old, field) != getattr(new, field)]
    if differing:
        pairs = ", ".join(f"{field} {getattr(old, field)} → {getattr(new, field)}" for field in differing)
        return Incomparable(Verdict.INCOMPATIBLE, f"{name} is another quantity than before: {pairs}.")
    if places is None:
        return None
    before, now = places
    if "machine" in new.depends_on and before.machine != now.machine:
        reason = f"{name} depends on the machine; the baseline is of {before.machine}, this is {now.machine}."
        return Incomparable(Verdict.INCOMPATIBLE, reason)
    if (text := other_python(new, before.python, now.python)) is not None:
        return Incomparable(Verdict.INCOMPATIBLE, f"{name} {text}.", judged=False)
    below = _moved_below_torch(before.stack, now.stack) if new.noise != "exact" else ()
    if below:
        values = sizes.pair(old.value, new.value, new.unit)
        reason = f"{name} {values}, but time cannot be compared across {', '.join(below)}."
        return Incomparable(Verdict.INCONCLUSIVE, reason)
    return None


def other_python(metric: Metric, old: str, new: str) -> str | None:
    """Return why a metric cannot be compared between two versions of Python; None if it can."""
    before, now = (".".join(version.split(".")[:2]) for version in (old, new))
    if before == now or "python" not in metric.depends_on:
        return None
    return f"depends on Python's minor version, which was {before} and is {now}"


def packages_moved(old: Mapping[str, str], new: Mapping[str, str]) -> tuple[str, ...]:
    """Return the packages whose version moved, by name: "transformers 5.23.0 → 5.24.0", "peft absent → 0.21.0"."""
    return tuple(moved(old, new, "absent").values())


def moved(old: Mapping[str, str], new: Mapping[str, str], missing: str) -> dict[str, str]:
    """Return what differs, by name, as text; `missing` stands for what one side does not have."""
    return {
        name: f"{name} {old.get(name, missing)} → {new.get(name, missing)}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    }


def _moved_below_torch(old: Mapping[str, str], new: Mapping[str, str]) -> tuple[str, ...]:
    """Return the moves of driver and CUDA, and of the CUDA that torch was built for."""
    return packages_moved(_below_torch(old), _below_torch(new))


def _below_torch(stack: Mapping[str, str]) -> dict[str, str]:
    below = {name: stack[name] for name in ("driver", "cuda") if name in stack}
    build = stack.get("torch", "").partition("+")[2]
    return below | ({"torch's build": build} if build else {})


def case_changes(old: Case, new: Case) -> tuple[str, ...]:
    """Return the fields that differ in what runs: "adapter.rank 8 → 16". A field that is not stated reads "default"."""
    before, after = (_flat(msgspec.json.decode(case_to_json(case))) for case in (old, new))
    return tuple(
        f"{name} {before.get(name) or _unstated(after[name])} → {after.get(name) or _unstated(before[name])}"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name) and name.partition(".")[0] not in _NOT_RUN
    )


def _unstated(other: str) -> str:
    """Return how a field reads that only the other side states: a part is missing, a value has its default."""
    return "none" if other == _GIVEN else "default"


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return every stated field by its dotted name, as text; a part itself reads "given", so that an empty one shows."""
    flat: dict[str, str] = {}
    for name, value in content.items():
        path = prefix + plain(name)
        flat[path] = _GIVEN if isinstance(value, dict) else repr(value)
        if isinstance(value, dict):
            flat |= _flat(value, f"{path}.")
    return flat
