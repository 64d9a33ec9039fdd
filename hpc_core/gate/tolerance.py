"""How far a metric may lie from its accepted value, and on which side. Knows noise classes and limits, no record.

Tolerances count from the accepted value, so that small steps cannot accumulate unseen.
"""

from __future__ import annotations

import msgspec

from hpc_core.case.limits import Limit, MiB, relative_limit
from hpc_core.gate.spread import Family
from hpc_core.gate.verdict import Verdict
from hpc_core.record import units as sizes
from hpc_core.record.record import Metric

__all__ = [
    "BUSY_RATIOS",
    "BYTES_FLOOR",
    "BYTES_RATIO",
    "PAIRED_RATIO",
    "Tolerance",
    "beyond",
    "ceiling_text",
    "exceeds",
    "tolerance",
]

BYTES_RATIO = 0.0005
"""0.05 %: exact bytes."""
BYTES_FLOOR = 2 * MiB
"""What a real allocator rounds to; counted tensor bytes are deterministic and get no floor."""
BUSY_RATIOS: dict[Family, float] = {"train": 0.02, "prefill": 0.03, "decode": 0.05}
"""GPU-busy time against stored sessions. An interval that lies on both sides of it is INCONCLUSIVE, so the tolerance leaves room
for what two machine starts differ by (`hpc_core.gate.spread`): a clean run passes although its interval is not narrow."""
PAIRED_RATIO = 0.005
"""0.5 %: GPU-busy time in an A/B of one session, where machine starts play no part."""


class Tolerance(msgspec.Struct, frozen=True):
    """The allowed distance from the accepted value, in the metric's unit, and its text: "+0.05 %" or "equal"."""

    distance: float
    text: str


def tolerance(accepted: Metric, limit: Limit = None, family: Family = "train") -> Tolerance:
    """The tolerance of a gated metric. A percentage replaces the default, floor included; a number leaves it alone.

    `family` is the noise family of a busy metric.
    """
    relative = relative_limit(limit)
    sign = {"lower": "+", "higher": "-", "same": "±"}[accepted.better]
    if relative is not None:
        return _relative(accepted, relative, sign)
    if accepted.noise == "busy":
        return _relative(accepted, BUSY_RATIOS[family], sign)
    if accepted.unit != "bytes":
        return Tolerance(0.0, "equal")
    default = _relative(accepted, BYTES_RATIO, sign)
    if "machine" in accepted.depends_on and default.distance < BYTES_FLOOR:
        return Tolerance(float(BYTES_FLOOR), f"{sign}{sizes.quantity(BYTES_FLOOR, 'bytes')}")
    return default


def _relative(accepted: Metric, ratio: float, sign: str) -> Tolerance:
    text = "equal" if ratio == 0 else f"{sign}{sizes.percent(ratio).removeprefix('+')}"
    return Tolerance(ratio * abs(accepted.value), text)


def beyond(accepted: Metric, new: float, allowed: Tolerance) -> Verdict:
    """REGRESSED or IMPROVED beyond the tolerance, else PASS. Where neither side is better, both are REGRESSED."""
    difference = new - accepted.value
    if abs(difference) <= allowed.distance:
        return Verdict.PASS
    better = {"lower": difference < 0, "higher": difference > 0, "same": False}[accepted.better]
    return Verdict.IMPROVED if better else Verdict.REGRESSED


def exceeds(metric: Metric, limit: float) -> bool:
    """Whether a value breaks an absolute limit: a ceiling, or a floor where higher is better."""
    return metric.value < limit if metric.better == "higher" else metric.value > limit


def ceiling_text(metric: Metric, limit: float) -> str:
    """An absolute limit in words: "at most 8.00 GiB"."""
    side = "at least" if metric.better == "higher" else "at most"
    return f"{side} {sizes.quantity(limit, metric.unit)}"
