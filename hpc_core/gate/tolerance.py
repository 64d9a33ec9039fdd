"""How far a metric may lie from its accepted value, and on which side. The gate and A/B both ask here.

Tolerances count from the accepted value, so that small steps cannot accumulate unnoticed.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from hpc_core.case.limits import Limit, MiB, relative_limit
from hpc_core.gate.verdict import Verdict
from hpc_core.record import units as sizes
from hpc_core.record.metrics import BYTES_RATIO, METRICS, Family, definition_of
from hpc_core.record.record import Metric

BYTES_FLOOR = 2 * MiB
"""What a real allocator rounds to. Tensor bytes are deterministic and get no floor."""
BUSY_RATIOS: dict[Family, float] = {each.family: each.tolerance for each in METRICS.values() if each.family is not None}
"""Tolerance of GPU-busy time against stored sessions."""
PAIRED_RATIO = 0.005
"""0.5 %: GPU-busy time in an A/B of one session, where machine starts play no part."""


class Tolerance(msgspec.Struct, frozen=True):
    """The allowed distance from the accepted value, in the metric's unit, and its text: "+0.05 %" or "equal"."""

    distance: float
    text: str


def tolerance(name: str, accepted: Metric, limit: Limit = None, *, ratio: float | None = None) -> Tolerance:
    """Return the tolerance of a gated metric.

    A percentage in `limit` replaces the default, its floor included; an absolute limit leaves the default alone. `ratio`
    replaces the registry's tolerance, as in A/B.
    """
    allowed = _relative(accepted, allowed_ratio(name, accepted, limit, ratio=ratio))
    is_default = ratio is None and relative_limit(limit) is None
    definition = definition_of(name)
    if is_default and definition is not None and allowed.distance < definition.floor:
        return Tolerance(definition.floor, f"{_sign(accepted)}{sizes.quantity(definition.floor, accepted.unit)}")
    is_measured = accepted.unit == "bytes" and "machine" in accepted.depends_on
    if is_default and is_measured and allowed.distance < BYTES_FLOOR:
        return Tolerance(float(BYTES_FLOOR), f"{_sign(accepted)}{sizes.quantity(BYTES_FLOOR, 'bytes')}")
    return allowed


def allowed_ratio(name: str, accepted: Metric, limit: Limit, *, ratio: float | None = None) -> float:
    """Return the share of the accepted value by which a metric may be worse: of its limit, else `ratio`, else the registry's."""
    named = relative_limit(limit)
    if named is not None:
        return named
    if ratio is not None:
        return ratio
    definition = definition_of(name)
    if definition is not None and (definition.noise, definition.unit) == (
        accepted.noise,
        accepted.unit.partition(" per ")[0],
    ):
        return definition.tolerance
    if accepted.noise == "busy":
        return BUSY_RATIOS["train"]
    return BYTES_RATIO if accepted.unit == "bytes" else 0.0


def strictest(name: str, accepted: Metric, limits: Iterable[Limit]) -> Limit:
    """Return the limit that leaves a metric the least distance from its accepted value; None for the registry's tolerance."""
    return min(
        (limit if isinstance(limit, str) else None for limit in limits),
        key=lambda limit: tolerance(name, accepted, limit).distance,
    )


def strictest_absolute(metric: Metric, limits: Iterable[Limit]) -> float | None:
    """Return the absolute limit that is broken first; None without one."""
    numbers = [limit for limit in limits if limit is not None and not isinstance(limit, str)]
    if not numbers:
        return None
    return max(numbers) if metric.better == "higher" else min(numbers)


def _relative(accepted: Metric, ratio: float) -> Tolerance:
    text = "equal" if ratio == 0 else f"{_sign(accepted)}{sizes.percent(ratio).removeprefix('+')}"
    return Tolerance(ratio * abs(accepted.value), text)


def _sign(metric: Metric) -> str:
    return {"lower": "+", "higher": "-", "same": "±"}[metric.better]


def beyond(accepted: Metric, new: float, allowed: Tolerance) -> Verdict:
    """Return REGRESSED or IMPROVED beyond the tolerance, else PASS. Where neither side is better, both are REGRESSED."""
    difference = new - accepted.value
    if abs(difference) <= allowed.distance:
        return Verdict.PASS
    better = {"lower": difference < 0, "higher": difference > 0, "same": False}[accepted.better]
    return Verdict.IMPROVED if better else Verdict.REGRESSED


def exceeds(metric: Metric, limit: float) -> bool:
    """Return whether a value breaks an absolute limit: a ceiling, or a floor where higher is better."""
    return metric.value < limit if metric.better == "higher" else metric.value > limit


def ceiling_text(metric: Metric, limit: float) -> str:
    """Return an absolute limit in words: "at most 8.00 GiB"."""
    side = "at least" if metric.better == "higher" else "at most"
    return f"{side} {sizes.quantity(limit, metric.unit)}"
