"""Why a case moved, in two lines and details: the findings of each resource, ranked by what was judged and by size."""

from __future__ import annotations

from pathlib import Path

import msgspec

from hpc_core.baselines.lookup import find
from hpc_core.explain.around import around, broken_facts
from hpc_core.explain.before import Before, stored_before
from hpc_core.explain.device import device_finding
from hpc_core.explain.finding import Resource
from hpc_core.explain.memory import memory_finding
from hpc_core.explain.work import module_changes, work_finding
from hpc_core.gate.verdict import Judgement, Verdict
from hpc_core.record.record import Record

__all__ = ["Cause", "explain", "stored_cause"]

_MOVED = (Verdict.REGRESSED, Verdict.IMPROVED, Verdict.INCONCLUSIVE)
_DEVICE = ("busy", "kernels", "copies", "memsets", "synchronizations")
_MOST_FACTS = 2


class Cause(msgspec.Struct, frozen=True, kw_only=True):
    """Why a case moved."""

    lines: tuple[str, ...]
    """Two: what moved most and where; what else moved, and what is different around it."""
    details: tuple[str, ...] = ()
    """Everything else, the most telling first."""


def stored_cause(root: Path, record: Record, judgement: Judgement | None) -> Cause | None:
    """Why this record differs from its baseline in the folder `root`; None if it failed, passed or has none.

    Raises:
        BaselineError: as `store.baseline_path`.
    """
    if record.failure is not None or (judgement is not None and judgement.verdict is Verdict.PASS):
        return None
    key = record.circumstances.machine.key
    before = stored_before(root, key, find(root, key, record.case.id))
    return None if before is None else explain(before, record, judgement)


def explain(before: Before, now: Record, judgement: Judgement | None = None) -> Cause | None:
    """Why a record differs from what was; None if nothing differs. `judgement` says which differences count most."""
    found = [
        each for each in (memory_finding(before, now), device_finding(before, now), work_finding(before, now)) if each
    ]
    facts = broken_facts(now)
    modules = module_changes(before.profile, now.profile)
    if not found and not facts and not modules:
        return None
    judged = _judged(judgement)
    ranked = sorted(
        found, key=lambda each: (judged.get(each.resource, 2), not each.worse, not each.placed, -each.share)
    )
    surroundings = around(before, now)
    what = [*(each.line for each in ranked[:1]), *facts[:_MOST_FACTS], *modules[:1]]
    also = [f"also {each.line}" for each in ranked[1:2]]
    details = [text for each in ranked for text in each.details]
    further = [*(each.line for each in ranked[2:]), *facts[_MOST_FACTS:], *modules[1:]]
    lines = ("; ".join(what), "; ".join([*also, *surroundings[:3]]))
    more = (*further, *details, *surroundings[3:], *_missing(before, now))
    # What the lines say in the same words is not said again.
    return Cause(lines=lines, details=tuple(text for text in more if not any(text in line for line in lines)))


def _judged(judgement: Judgement | None) -> dict[Resource, int]:
    """The resources of which a metric moved beyond what is allowed: 0 where one got worse, else 1."""
    rows = () if judgement is None else judgement.metrics
    better: dict[Resource, int] = {_resource(row.metric): 1 for row in rows if row.verdict in _MOVED}
    return better | {_resource(row.metric): 0 for row in rows if row.verdict is Verdict.REGRESSED}


def _resource(metric: str) -> Resource:
    if metric.endswith("_bytes"):
        return "memory"
    return "device" if metric.startswith(_DEVICE) else "work"


def _missing(before: Before, now: Record) -> list[str]:
    if before.profile is None and now.profile is not None:
        return [
            "the baseline has no profile, so modules are not compared: it comes with the next --perf-update, or by hpc-core baseline add-profile"
        ]
    if before.profile_of and now.profile is not None and now.profile.kernels:
        return [
            f"the baseline's profile is of {before.profile_of}, with the same bytes and operators, so kernels are compared by family alone"
        ]
    return []
