"""Format numbers for people: "+1.88 GiB", "+3.2 %", "1,617 → 1,645". A difference that is not zero is never shown as zero."""

from __future__ import annotations

import math
from typing import Any

_BINARY = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))
_SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
_FLOP = ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1, "FLOP"))
_SCALES = {"bytes": _BINARY, "s": _SECONDS, "FLOP": _FLOP}
_PLAIN_DIGITS = 15


def quantity(value: float, unit: str) -> str:
    """Return a value with its unit: bytes in powers of 1024, seconds and FLOP in powers of 1000, counts (unit "1") without a unit.

    A unit may end in what a total covers: "1 per 10 steps" gives "52,940 per 10 steps".
    """
    unit, per, covered = unit.partition(" per ")
    if per:
        return f"{quantity(value, unit)} per {covered}"
    scale = _SCALES.get(unit)
    if scale is None:
        return _number(value) if unit == "1" else f"{_number(value)} {unit}"
    if value == 0:
        return f"0 {'B' if unit == 'bytes' else unit}"
    size, name = next(((size, name) for size, name in scale if abs(value) >= size), scale[-1])
    if size == 1 and abs(value) < 10**_PLAIN_DIGITS and float(value).is_integer():
        return f"{int(value):,} {name}"
    return f"{_number(value / size, digits=2)} {name}"


def axis(largest: float, unit: str) -> tuple[float, str]:
    """Return the size and name of an axis's unit: (2**30, "GiB") for bytes from one GiB on, (1e-3, "ms") below a second."""
    if unit == "bytes":
        return (2.0**30, "GiB") if largest >= 2**30 else (2.0**20, "MiB")
    if unit == "s":
        return (1.0, "s") if largest >= 1 else (1e-3, "ms")
    return 1.0, "" if unit == "1" else unit


def change(difference: float, unit: str) -> str:
    """Return a difference with its sign: "+1.88 GiB", "-3 ms", "+0 B"."""
    text = quantity(difference, unit)
    return text if text.startswith("-") else f"+{text}"


def percent(ratio: float) -> str:
    """Return a relative difference with its sign and at least two significant digits: 0.032 is "+3.2 %", 2e-7 "+0.00002 %"."""
    return f"{_number(ratio * 100, sign='+', digits=2)} %"


def pair(old: float, new: float, unit: str) -> str:
    """Return old and new, with enough digits to tell them apart."""
    unit, per, covered = unit.partition(" per ")
    if per:
        return f"{pair(old, new, unit)} per {covered}"
    texts = quantity(old, unit), quantity(new, unit)
    if texts[0] == texts[1] and old != new:
        if unit in _SCALES and unit != "bytes":
            return _finer(old, new, _SCALES[unit])
        return f"{_exact(old)} → {_exact(new)}{'' if unit == '1' else f' {unit}'}"
    return f"{texts[0]} → {texts[1]}"


def counted(count: int, noun: str, plural: str = "") -> str:
    """Return a count with its noun: "1 session", "2 sessions", "3 processes"."""
    return f"{count} {noun if count == 1 else plural or f'{noun}s'}"


def _finer(old: float, new: float, scale: Any) -> str:
    """Return both in the larger one's prefix, with the fewest decimals that tell them apart."""
    size, name = next(((size, name) for size, name in scale if max(abs(old), abs(new)) >= size), scale[-1])
    texts = [(f"{old / size:,.{digits}f}", f"{new / size:,.{digits}f}") for digits in range(3, 17)]
    first, second = next((pair for pair in texts if pair[0] != pair[1]), (repr(old / size), repr(new / size)))
    return f"{first} {name} → {second} {name}"


def _exact(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else repr(value)


def _number(value: float, *, sign: str = "", digits: int | None = None) -> str:
    """Return grouped digits with at least `digits` decimals, and more if the value is too small to show."""
    if isinstance(value, int):
        return f"{value:{sign},}"
    if not math.isfinite(value):
        return f"{value:{sign}}"
    decimals = 2 if digits is None else digits
    if 0 < abs(value) < 1:
        decimals = max(decimals, 1 - math.floor(math.log10(abs(value))))
    if decimals > _PLAIN_DIGITS or abs(value) >= 10**_PLAIN_DIGITS:
        return f"{value:{sign}.3g}"
    text = f"{value:{sign},.{decimals}f}"
    return text if digits is not None and sign == "" else text.rstrip("0").rstrip(".")
