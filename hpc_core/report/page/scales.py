"""Axes: which ticks, and where a value lies on them. Numbers only, and every answer is finite."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

__all__ = ["Axis", "linear", "log"]

_MOST_DECADES = 40
_LARGEST = 1e60
"""Beyond it nothing was measured, and powers would overflow."""


class Axis(msgspec.Struct, frozen=True, kw_only=True):
    """From `low` to `high`; `is_log` where decades are equally far apart."""

    low: float
    high: float
    is_log: bool
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """0 at the low end to 1 at the high one; what lies beyond is put at the end."""
        if self.is_log:
            share = (math.log10(max(value, 1 / _LARGEST**4)) - math.log10(self.low)) / math.log10(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return min(1.0, max(0.0, share))


def log(values: Sequence[float]) -> Axis:
    """An axis of whole and half decades around positive values."""
    sound = [min(max(value, 1 / _LARGEST), _LARGEST) for value in values if math.isfinite(value) and value > 0] or [1.0]
    top = math.log10(max(sound))
    bottom = max(math.log10(min(sound)), top - _MOST_DECADES)
    low, high = _step_below(bottom - 0.05), _step_above(top + 0.05)
    if high - low < 0.5:
        high = low + 0.5
    spread = math.ceil(high) - math.floor(low)
    every = max(1, spread // 6)
    ticks = [10.0**power for power in range(math.ceil(low), math.floor(high) + 1) if power % every == 0]
    if spread <= 2:
        ticks = sorted({m * 10.0**p for p in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)})
        ticks = [tick for tick in ticks if low <= math.log10(tick) <= high]
    return Axis(low=10.0**low, high=10.0**high, is_log=True, ticks=tuple(ticks))


def _step_below(power: float) -> float:
    """The next lower of 1, 2, 5 in its decade."""
    whole = math.floor(power)
    return max(whole + step for step in (0.0, math.log10(2), math.log10(5)) if whole + step <= power)


def _step_above(power: float) -> float:
    whole = math.floor(power)
    return min(whole + step for step in (0.0, math.log10(2), math.log10(5), 1.0) if whole + step >= power)


def linear(values: Sequence[float]) -> Axis:
    """An axis from zero with round ticks."""
    most = min(_LARGEST, max((value for value in values if math.isfinite(value)), default=0.0))
    if most <= 1 / _LARGEST:
        return Axis(low=0.0, high=1.0, is_log=False, ticks=(0.0, 1.0))
    rough = most / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough)
    count = math.ceil(most / step - 1e-9)
    return Axis(low=0.0, high=step * count, is_log=False, ticks=tuple(step * index for index in range(count + 1)))
