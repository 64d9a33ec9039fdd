"""The one door that puts a fault in place, and what is in place in this process."""

from __future__ import annotations

import contextlib
import importlib

from hpc_core.case.errors import SpecError
from hpc_core.faults.catalogue import FAULTS
from hpc_core.faults.fault import TWIN, Injection

__all__ = ["in_place", "inject"]

_IN_PLACE: list[str] = []


def inject(name: str) -> Injection:
    """Put the fault (or its twin, `NAME.twin`) in place, for the rest of this process.

    Raises:
        SpecError: no fault has this name; the message lists them.
    """
    fault = FAULTS.get(name.removesuffix(TWIN))
    if fault is None:
        known = "\n".join(f"  {known.name}: {known.summary}" for known in FAULTS.values())
        raise SpecError(f"No fault is called {name!r}. There are:\n{known}")
    with contextlib.suppress(ModuleNotFoundError):
        # Its first import puts another object in `transformers`' place, on which a patch that was made before is missing.
        importlib.import_module("peft")
    injection = Injection(fault, active=not name.endswith(TWIN))
    module, _, function = fault.patch.partition(".")
    getattr(importlib.import_module(f"hpc_core.faults.{module}"), function)(injection)
    _IN_PLACE.append(name)
    return injection


def in_place() -> tuple[str, ...]:
    """The faults that were injected into this process, oldest first. None is ever taken out."""
    return tuple(_IN_PLACE)
