"""All faults by name, and the function that injects one.

`pytest --benchmark --case ID --perf-fault NAME` runs a case with a fault. Such a record never becomes a baseline.
"""

from __future__ import annotations

import contextlib
import importlib
from types import ModuleType

from hpc_core.case.errors import SpecError
from hpc_core.faults import building, generation, host, training
from hpc_core.faults.fault import TWIN, Fault, Injection, put_in_place


def _declared(module: ModuleType) -> list[Fault]:
    return [value for value in vars(module).values() if isinstance(value, Fault)]


FAULTS: dict[str, Fault] = {
    fault.name: fault for module in (building, training, generation, host) for fault in _declared(module)
}

_IN_PLACE: list[str] = []


def inject(name: str) -> Injection:
    """Put a fault, or its no-op twin `NAME.twin`, in place for the rest of this process.

    Raises:
        SpecError: no fault has this name. The message lists them.
    """
    fault = FAULTS.get(name.removesuffix(TWIN))
    if fault is None:
        known = "\n".join(f"  {known.name}: {known.summary}" for known in FAULTS.values())
        raise SpecError(f"No fault is called {name!r}. There are:\n{known}")
    with contextlib.suppress(ModuleNotFoundError):
        # Importing peft replaces objects in transformers, so a patch made before would be lost.
        importlib.import_module("peft")
    injection = Injection(fault, active=not name.endswith(TWIN))
    put_in_place(injection)
    _IN_PLACE.append(name)
    return injection


def in_place() -> tuple[str, ...]:
    """Return the faults that were injected into this process, oldest first. They are never removed."""
    return tuple(_IN_PLACE)
