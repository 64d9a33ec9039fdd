"""Explain why a case moved, in two lines and details: the findings of each resource, ranked by what was judged and by size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from hpc_core.baselines.lookup import find
from hpc_core.explain.before import Before, stored_before
from hpc_core.explain.device import device_finding
from hpc_core.explain.host import host_finding
from hpc_core.explain.memory import memory_finding
from hpc_core.explain.time import time_finding
from hpc_core.explain.work import module_changes, recompiled_finding, work_finding
from hpc_core.gate.comparability import Place, case_changes, packages_moved
from hpc_core.gate.suspects import suspects
from hpc_core.gate.verdict import Judgement, Verdict
from hpc_core.record.gpu_state import clock_of
from hpc_core.record.metrics import Resource, definition_of
from hpc_core.record.record import Record

_MOVED = (Verdict.REGRESSED, Verdict.IMPROVED, Verdict.INCONCLUSIVE)
_MOST_FACTS = 2
_MOST_NOTES = 3
_LONGEST = 60
"""Characters of a fact's value that are shown."""
_CLOCK_SHARE = 0.02
"""Clocks under load that differ by less count as equal."""


class Cause(msgspec.Struct, frozen=True, kw_only=True):
    """Why a case moved."""

    lines: tuple[str, ...]
    """Two: what moved most and where; what else moved, and what is different around it."""
    details: tuple[str, ...] = ()
    """Everything else, the most important first."""


def stored_cause(root: Path, record: Record, judgement: Judgement | None) -> Cause | None:
    """Return why this record differs from its baseline in the folder `root`; None if it failed, passed or has none.

    Raises:
        BaselineError: as `baseline_path`.
    """
    if record.failure is not None or (judgement is not None and judgement.verdict is Verdict.PASS):
        return None
    key = record.circumstances.machine.key
    before = stored_before(root, key, find(root, key, record.case.id))
    return None if before is None else explain(before, record, judgement)


def explain(before: Before, now: Record, judgement: Judgement | None = None) -> Cause | None:
    """Return why a record differs from an earlier one; None if nothing differs. What `judgement` finds worse comes first."""
    found = [each(before, now) for each in (memory_finding, device_finding, work_finding, host_finding)]
    found.append(time_finding(before, now, judgement))
    facts = _broken_facts(now)
    modules = module_changes(before.profile, now.profile)
    again = recompiled_finding(before, now)
    if again is None and not any(found) and not facts and not modules:
        return None
    judged = _judged(judgement)
    ranked = sorted(
        (each for each in found if each is not None),
        key=lambda each: (judged.get(each.resource, 2), not each.worse, not each.placed, -each.share),
    )
    if again is not None:
        ranked.insert(0, again)  # all else follows from it
    surroundings = _surroundings(before, now)
    what = [*(each.line for each in ranked[:1]), *facts[:_MOST_FACTS], *modules[:1]]
    also = [f"also {each.line}" for each in ranked[1:2]]
    details = [text for each in ranked for text in each.details]
    further = [*(each.line for each in ranked[2:]), *facts[_MOST_FACTS:], *modules[1:]]
    lines = ("; ".join(what), "; ".join([*also, *surroundings[:3]]))
    more = (*further, *details, *surroundings[3:], *_missing(before, now))
    # The details do not repeat the lines.
    return Cause(lines=lines, details=tuple(text for text in more if not any(text in line for line in lines)))


def _judged(judgement: Judgement | None) -> dict[Resource, int]:
    """Return the resources with a metric that moved beyond what is allowed: 0 where one got worse, else 1."""
    rows = () if judgement is None else judgement.metrics
    ranks: dict[Resource, int] = {}
    for row in rows:
        if row.verdict in _MOVED:
            resource = _resource(row.metric, row.unit)
            ranks[resource] = min(ranks.get(resource, 1), 0 if row.verdict is Verdict.REGRESSED else 1)
    return ranks


def _resource(metric: str, unit: str) -> Resource:
    """Return the resource that explains a metric: the registry's, or by unit for a metric of somebody else's."""
    definition = definition_of(metric)
    if definition is not None and definition.explained is not None:
        return definition.explained
    return "memory" if unit == "bytes" else "device" if unit == "s" else "work"


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


def _broken_facts(now: Record) -> tuple[str, ...]:
    """Return what was not as the case asks: "checkpointing seen 'off', asked for 'non-reentrant'"."""
    return tuple(
        f"{name} seen {_cut(fact.seen)}, asked for {_cut(fact.asked)}"
        for name, fact in now.audit.items()
        if not fact.holds
    )


def _cut(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _surroundings(before: Before, now: Record) -> tuple[str, ...]:
    """Return what differs around the runs, one text each: packages first, then the case, the GPU, the commit."""
    run = now.circumstances
    places = (
        Place(run.machine.key, before.stack, before.settings),
        Place(run.machine.key, run.stack, run.settings),
    )
    differences = [f"moved: {text}" for text in suspects(now.case, *places)]
    differences += [f"case: {text}" for text in case_changes(before.case, now.case)]
    if not differences:
        unused = packages_moved(before.stack, run.stack)
        differences.append(
            "case as before, and no package that it uses moved" if unused else "stack and case as before"
        )
    if before.record is not None:
        differences += _gpu(before.record, now)
    if before.commit != run.commit and before.commit and run.commit:
        dirty = " and uncommitted changes" if run.dirty else ""
        differences.append(f"code: {before.commit[:10]}..{run.commit[:10]}{dirty}")
    return tuple(differences)


def _gpu(old: Record, new: Record) -> list[str]:
    before, after = old.circumstances, new.circumstances
    differences = []
    if before.machine.name != after.machine.name and before.machine.key != "cpu":
        differences.append(f"GPU: {before.machine.name} → {after.machine.name}")
    means = [clock.mean_mhz for clock in map(clock_of, (before.gpu, after.gpu)) if clock is not None]
    # A mean is not compared with the one reading of an older record.
    clocks = [round(mean) for mean in means] if len(means) == 2 else [_clock(before.gpu), _clock(after.gpu)]
    if all(clocks) and abs(clocks[1] - clocks[0]) > _CLOCK_SHARE * clocks[0]:
        differences.append(f"GPU clock under load: {clocks[0]} → {clocks[1]} MHz")
    flagged = [note for note in after.notes if note.startswith("GPU ")]
    return differences + flagged[:_MOST_NOTES]


def _clock(gpu: Mapping[str, Any]) -> int:
    during = gpu.get("busy", {})
    state = during.get("during", {}) if isinstance(during, Mapping) else {}
    value = state.get("sm_clock_mhz", 0) if isinstance(state, Mapping) else 0
    return int(value) if isinstance(value, int | float) else 0
