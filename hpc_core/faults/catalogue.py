"""The faults by name, what each should turn red, and the one door that injects them.

Knows no torch: a fault's patch lies in `patches` and is imported when it is injected.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field

from hpc_core.errors import SpecError

__all__ = ["FAULTS", "Fault", "Injection", "inject"]


@dataclass(frozen=True)
class Fault:
    """One way to get worse, applied from outside the code that it worsens."""

    name: str
    summary: str
    shows_in: tuple[str, ...]
    """Metrics or audit facts of which at least one must turn red."""
    patch: str
    """Name of the function in `hpc_core.faults.patches`."""


@dataclass
class Injection:
    """A fault that is in place; `hits` counts how often its changed code ran."""

    fault: Fault
    hits: int = field(default=0)

    def hit(self) -> None:
        """The changed code ran."""
        self.hits += 1


FAULTS: dict[str, Fault] = {
    fault.name: fault
    for fault in (
        Fault(
            "gc-off",
            "gradient checkpointing is asked for and silently not switched on",
            ("checkpointing",),
            "checkpointing_off",
        ),
        Fault(
            "retained-64mib",
            "the optimizer's first step leaves 64 MiB behind",
            ("peak_bytes", "at_peak_other_bytes"),
            "retained_tensor",
        ),
        Fault("extra-kernel", "every decoder layer launches one kernel more", ("kernels", "operators"), "extra_kernel"),
        Fault(
            "fp32-adapters",
            "adapters are stored in float32, whatever was asked for",
            ("adapter_dtype",),
            "float32_adapters",
        ),
        Fault(
            "rank-16",
            "LoRA's rank is 16, whatever was asked for",
            ("trainable_parameters", "adapter_weights_bytes"),
            "rank_16",
        ),
    )
}
"""The catalogue."""


def inject(name: str) -> Injection:
    """Put the fault in place, for the rest of this process.

    Raises:
        SpecError: no fault has this name; the message lists them.
    """
    fault = FAULTS.get(name)
    if fault is None:
        known = "\n".join(f"  {known.name}: {known.summary}" for known in FAULTS.values())
        raise SpecError(f"No fault is called {name!r}. There are:\n{known}")
    injection = Injection(fault)
    getattr(importlib.import_module("hpc_core.faults.patches"), fault.patch)(injection)
    return injection
