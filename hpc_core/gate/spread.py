"""How much GPU-busy time moves where nothing changed, as far as it is known before a machine has sessions of its own.

Data with their source. Standard deviations of log values, so 0.002 is 0.2 %.
"""

from __future__ import annotations

from typing import Literal

import msgspec

__all__ = ["COMPUTE_BOUND", "SPREADS", "Family", "Spread", "family_of"]

Family = Literal["train", "prefill", "decode"]
COMPUTE_BOUND: frozenset[Family] = frozenset({"train", "prefill"})
"""Whose busy time follows the SM clock; a decoded token reads weights, at the clock of the memory."""


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """What is assumed of a noise family."""

    within: float
    """Standard deviation between processes of one machine start."""
    between: float
    """Standard deviation between machine starts."""
    degrees: float
    """Degrees of freedom that the assumption counts for, beside the sessions that are stored."""
    source: str


_WITHIN = 0.0015
"""0.15 % was the whole range of a training step over five processes of one start (reference measurements, one H100): as a
standard deviation it is twice what was seen."""
_DEGREES = 10.0
"""A choice: the spreads below are the largest difference seen, as if every case had differed so much, and then rounded up."""


def _between(largest: str, spread: float) -> Spread:
    source = f"two H100 starts, one process each: the cases differed by at most {largest}; divided by √2 and rounded up"
    return Spread(within=_WITHIN, between=spread, degrees=_DEGREES, source=source)


SPREADS: dict[Family, Spread] = {
    "train": _between("0.22 %", 0.002),
    "prefill": _between("0.66 %", 0.005),
    "decode": _between("1.30 %", 0.010),
}


def family_of(metric: str) -> Family:
    """The noise family of a busy metric. A step of the user's own counts as training, whose spread is the least."""
    return "prefill" if "prefill" in metric else "decode" if "decode" in metric else "train"
