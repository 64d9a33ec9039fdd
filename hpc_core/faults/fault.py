"""What a fault is: a function of the code under test, replaced by a worse one.

A fault is declared by decorating the worse version:

    @fault("rank-16", "LoRA uses rank 16, whatever the case asks for", patch="peft:LoraConfig", ...)
    def rank_16(original, *args, **kwargs):
        return original(*args, **(kwargs | {"r": 16}))

This module imports no torch.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from hpc_core.record.findings import Findings

Call = Callable[..., Any]
Where = Literal["cpu", "gpu", "both"]

TWIN = ".twin"
"""Suffix of a no-op twin's name. A twin replaces the same function but calls the original. It must stay green."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One way to become slower, bigger or wrong, applied from outside the code that it worsens."""

    name: str
    summary: str
    variant: str
    """The variant it is tried on: `tiny/<variant>` on a CPU, `llama-3.2-3b/<variant>-4-layers` on a GPU."""
    shows_in: tuple[str, ...]
    """Metrics or audit facts of which at least one must turn red. A trailing * matches any ending."""
    patch: str
    """The function to replace: `module:function`, `module:Class.method` or `module:registry[key]`."""
    replacement: Callable[[Call, Injection], Call]
    """Makes the function that takes the place of the original."""
    seen_on: Where = "both"
    """Where the gate must catch it. It is not tried elsewhere."""
    predicted: tuple[str, ...] = ()
    """What must turn red in a prediction, without a GPU. Empty if a prediction, which has no values and times, cannot see it."""
    needs: str | None = None
    """What it takes to see this fault: "A/B" if one run is not enough, or "--jobs 1" where only wall time may show it, which is judged
    in a run that has the machine to itself. Without it the fault is tried and not counted."""


@dataclass
class Injection:
    """A fault that is in place. `hits` counts the calls of its replaced function."""

    fault: Fault
    active: bool = True
    """False in a no-op twin."""
    hits: int = 0

    def hit(self) -> bool:
        """Count a call, and return whether it must do harm."""
        self.hits += 1
        return self.active

    def findings(self, case_id: str) -> Findings:
        """Return how often the changed code ran. A fault that was never reached proves nothing: the record is INVALID."""
        name = self.fault.name
        note = f"the fault {name} was injected; its changed code ran {self.hits:,} times"
        reason = f"The fault {name} was injected, but {case_id} never reaches the code that it changes: it proves nothing here."
        return Findings(notes=(note,), reasons=() if self.hits else (reason,))


def fault(
    name: str, summary: str, *, on: str, shows_in: tuple[str, ...], patch: str, **more: Any
) -> Callable[[Call], Fault]:
    """Declare a fault by its worse version: a function that takes the original and the arguments of the call.

    Args:
        name: as in `hpc-core faults --only NAME`.
        summary: what goes wrong, for the table.
        on: `Fault.variant`.
        shows_in: `Fault.shows_in`.
        patch: `Fault.patch`.
        more: the other fields of `Fault`.
    """

    def declare(worse: Call) -> Fault:
        def replacement(original: Call, injection: Injection) -> Call:
            def call(*args: Any, **kwargs: Any) -> Any:
                return worse(original, *args, **kwargs) if injection.hit() else original(*args, **kwargs)

            call.__wrapped__ = original  # type: ignore[attr-defined]  # generate() reads the signature
            return call

        return Fault(
            name=name, summary=summary, variant=on, shows_in=shows_in, patch=patch, replacement=replacement, **more
        )

    return declare


def put_in_place(injection: Injection) -> None:
    """Replace the function that the fault names, for the life of the process.

    Raises:
        ImportError: the module does not exist.
        AttributeError: the module has no such function.
        KeyError: the registry has no such key.
    """
    owner, name, is_key = target(injection.fault.patch)
    if is_key:
        owner[name] = injection.fault.replacement(owner[name], injection)
    else:
        setattr(owner, name, injection.fault.replacement(getattr(owner, name), injection))


def target(patch: str) -> tuple[Any, str, bool]:
    """Return the owner of a function to replace, its name, and whether that is a key of a registry."""
    module, _, path = patch.partition(":")
    path, bracket, key = path.removesuffix("]").partition("[")
    *parents, name = path.split(".") if not bracket else [*path.split("."), key]
    return functools.reduce(getattr, parents, importlib.import_module(module)), name, bool(bracket)
