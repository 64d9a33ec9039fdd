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
"""Four cases on four H100 starts, four processes each (docs/data/aa-h100.json): 0.13 % for training and decoding, 0.16 % for prefill, pooled."""
_DEGREES = 10.0
"""A choice, well below what was seen: the spreads below are of the case that moved most, as if every case did."""


def _between(most: str, spread: float) -> Spread:
    source = f"up to seven H100 starts on several cards: the case that moved most by {most}, rounded up"
    return Spread(within=_WITHIN, between=spread, degrees=_DEGREES, source=source)


SPREADS: dict[Family, Spread] = {
    "train": _between("0.30 %", 0.003),
    "prefill": _between("0.28 %", 0.003),
    "decode": _between("1.01 %", 0.010),
}


def family_of(metric: str) -> Family:
    """The noise family of a busy metric. A step of the user's own counts as training, whose spread is the least."""
    return "prefill" if "prefill" in metric else "decode" if "decode" in metric else "train"
