"""What would settle an INCONCLUSIVE comparison with stored sessions: how many more processes, or sessions. Pure.

Computed as if the change and the spread stayed what they are now: an estimate of the effort, no promise of the verdict.
"""

from __future__ import annotations

from hpc_core.gate.distance import Distance
from hpc_core.gate.interval import interval_of, three_way
from hpc_core.gate.verdict import Verdict
from hpc_core.record.record import Better

__all__ = ["settled_by"]

_MOST_PROCESSES = 12
_MOST_SESSIONS = 12


def settled_by(distance: Distance, alpha: float, tolerance: float, better: Better) -> str:
    """The least effort that would decide: "2 more processes", "3 more sessions", or an A/B, which no session's luck enters."""

    def decides(more: Distance) -> bool:
        return three_way(interval_of(more, alpha), tolerance, better) is not Verdict.INCONCLUSIVE

    for count in range(1, _MOST_PROCESSES + 1):
        if decides(distance.grown(new=count)):
            return f"{count} more {'process' if count == 1 else 'processes'}"
    for count in range(1, _MOST_SESSIONS + 1):
        if decides(distance.grown(sessions=count)):
            return f"{count} more accepted {'session' if count == 1 else 'sessions'}, or an A/B: hpc-core ab"
    return f"an A/B (hpc-core ab): {_MOST_PROCESSES} more processes or {_MOST_SESSIONS} more sessions would not"
