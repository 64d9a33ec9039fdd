"""What is different around a run: facts of the audit that do not hold, fields of the case, packages, driver, GPU and its clocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpc_core.explain.before import Before
from hpc_core.gate.comparability import case_changes, packages_moved
from hpc_core.record.record import Record

__all__ = ["around", "broken_facts"]

_MOST = 3
_LONGEST = 60
"""Characters of a fact's value that are shown."""
_CLOCK_SHARE = 0.02


def broken_facts(now: Record) -> tuple[str, ...]:
    """What was not as the case asks: "checkpointing seen 'off', asked for 'non-reentrant'"."""
    return tuple(
        f"{name} seen {_cut(fact.seen)}, asked for {_cut(fact.asked)}"
        for name, fact in now.audit.items()
        if not fact.holds
    )


def _cut(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def around(before: Before, now: Record) -> tuple[str, ...]:
    """One text a difference: the stack as a suspect first, then the case, the GPU, the commit."""
    seen = now.circumstances
    said = [f"moved: {text}" for text in packages_moved(before.stack, seen.stack)]
    said += [f"case: {text}" for text in case_changes(before.case, now.case)]
    if not said:
        said.append("stack and case as before")
    if before.record is not None:
        said += _gpu(before.record, now)
    if before.commit != seen.commit and before.commit and seen.commit:
        said.append(f"code: {before.commit[:10]}..{seen.commit[:10]}{' and uncommitted changes' if seen.dirty else ''}")
    return tuple(said)


def _gpu(old: Record, new: Record) -> list[str]:
    before, after = old.circumstances, new.circumstances
    said = []
    if before.machine.name != after.machine.name and before.machine.key != "cpu":
        said.append(f"GPU: {before.machine.name} → {after.machine.name}")
    clocks = _clock(before.gpu), _clock(after.gpu)
    if all(clocks) and abs(clocks[1] - clocks[0]) > _CLOCK_SHARE * clocks[0]:
        said.append(f"GPU clock under load: {clocks[0]} → {clocks[1]} MHz")
    flagged = [note for note in after.notes if note.startswith("GPU ")]
    return said + flagged[:_MOST]


def _clock(gpu: Mapping[str, Any]) -> int:
    during = gpu.get("busy", {})
    state = during.get("during", {}) if isinstance(during, Mapping) else {}
    value = state.get("sm_clock_mhz", 0) if isinstance(state, Mapping) else 0
    return int(value) if isinstance(value, int | float) else 0
