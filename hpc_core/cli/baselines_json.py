"""A baseline, or what stands in its place, as JSON for `hpc-core baseline … --json`."""

from __future__ import annotations

from typing import Any

from hpc_core.baselines.baseline import Baseline, Damaged, Lookup, OlderSchema

__all__ = ["baseline_told"]


def baseline_told(machine: str, case: str, lookup: Lookup, *, metrics: bool = False) -> dict[str, Any]:
    """Machine, case and `state` ("sound", "damaged", "other schema", "gone"); of a sound one who accepted it, and its metrics if asked."""
    said: dict[str, Any] = {"machine": machine, "case": case}
    if isinstance(lookup, Baseline):
        said |= {"state": "sound", "digest": lookup.digest, "accepted": lookup.accepted, "stack": lookup.stack}
        return said | ({"metrics": lookup.metrics} if metrics else {"metric_count": len(lookup.metrics)})
    if isinstance(lookup, Damaged):
        return said | {"state": "damaged", "reason": lookup.reason}
    if isinstance(lookup, OlderSchema):
        return said | {"state": "other schema", "schema": lookup.found}
    return said | {"state": "gone"}
