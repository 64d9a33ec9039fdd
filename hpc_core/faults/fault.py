"""What a fault is, and what it is while it is in place. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["TWIN", "Fault", "Injection"]

TWIN = ".twin"
"""After a fault's name: put the patch in place and let it do what the original did. A twin must stay green."""


@dataclass(frozen=True)
class Fault:
    """One way to get slower, bigger or wrong, applied from outside the code that it worsens."""

    name: str
    summary: str
    variant: str
    """The variant it is tried on: `tiny/<variant>` on a CPU, `llama-3.2-3b/<variant>-4-layers` on a GPU."""
    shows_in: tuple[str, ...]
    """Metrics or audit facts of which at least one must turn red; a trailing * stands for any ending."""
    patch: str
    """`module.function` in this package."""
    seen_on: Literal["cpu", "gpu", "both"] = "both"
    """On which path the gate must catch it; on the other it is not tried."""
    predicted: tuple[str, ...] = ()
    """What a prediction alone, without a GPU, must turn red; empty where it cannot see the fault: it has no values and no times."""
    needs: str | None = None
    """What a verdict would take that one run against a baseline is not, such as "A/B". Such a fault is tried and counts neither as caught nor as missed."""


@dataclass
class Injection:
    """A fault that is in place; `hits` counts how often its patched code ran."""

    fault: Fault
    active: bool = True
    """False in a no-op twin: the patch is there and does what the original did."""
    hits: int = 0

    def hit(self) -> bool:
        """The patched code runs; whether it is to do harm."""
        self.hits += 1
        return self.active
