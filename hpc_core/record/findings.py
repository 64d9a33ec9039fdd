"""What one observation of a case found: a part of its record. Parts are immutable and joined with `|`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from hpc_core.case.case import Case
from hpc_core.record.profile import FunctionUse, HostTime, Profile
from hpc_core.record.record import Circumstances, Fact, KernelFamily, MemoryTimeline, Metric, Record


class Findings(msgspec.Struct, frozen=True, kw_only=True):
    """Metrics, facts and notes from one instrument, or from all that have run so far."""

    metrics: Mapping[str, Metric] = {}
    facts: Mapping[str, Fact] = {}
    """What was asked for and what ran, by name. One that does not hold makes the record INVALID."""
    notes: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    """Why the record is INVALID, beyond its facts."""
    losses: tuple[float, ...] = ()
    answers: tuple[str, ...] = ()
    kernel_families: Mapping[str, KernelFamily] = {}
    makers_at_peak: Mapping[str, int] = {}
    timeline: MemoryTimeline | None = None
    profile: Profile | None = None
    functions: tuple[FunctionUse, ...] = ()
    """What the host executed; part of the profile, if there is one."""
    host_times: tuple[HostTime, ...] = ()
    """Where the host spent its time; part of the profile, if there is one."""
    observed: Mapping[str, Any] = {}
    """Data for later instruments that no record contains, such as the operators of a counted step."""

    def __or__(self, later: Findings) -> Findings:
        """Return both. If both have a metric or fact of one name, the later one counts."""
        return Findings(
            metrics={**self.metrics, **later.metrics},
            facts={**self.facts, **later.facts},
            notes=self.notes + later.notes,
            reasons=self.reasons + later.reasons,
            losses=self.losses + later.losses,
            answers=self.answers + later.answers,
            kernel_families=later.kernel_families or self.kernel_families,
            makers_at_peak=later.makers_at_peak or self.makers_at_peak,
            timeline=later.timeline or self.timeline,
            profile=later.profile or self.profile,
            functions=later.functions or self.functions,
            host_times=later.host_times or self.host_times,
            observed={**self.observed, **later.observed},
        )

    def record(self, case: Case, circumstances: Circumstances) -> Record:
        """Return the record of these findings. It is INVALID if there are reasons."""
        return Record(
            case=case,
            status="invalid" if self.reasons else "ok",
            metrics=dict(sorted(self.metrics.items())),
            audit=dict(self.facts),
            reasons=self.reasons,
            makers_at_peak=dict(self.makers_at_peak),
            timeline=self.timeline,
            profile=None
            if self.profile is None
            else msgspec.structs.replace(self.profile, functions=self.functions, host_times=self.host_times),
            losses=tuple(
                loss for loss in self.losses if math.isfinite(loss)
            ),  # JSON has no NaN; the fact losses_finite reports them
            answers=self.answers,
            kernel_families=dict(self.kernel_families),
            circumstances=circumstances,
        )

    @property
    def sound(self) -> bool:
        """Whether every fact so far holds."""
        return all(fact.holds for fact in self.facts.values())


def checked(checks: Mapping[str, Callable[[], Fact | None]]) -> Findings:
    """Return the facts of these checks. A check that raises is left out and noted, because an unknown structure is not a mismatch."""
    facts: dict[str, Fact] = {}
    notes: list[str] = []
    for name, check in checks.items():
        try:
            fact = check()
        except Exception as error:  # a library's next version may be built differently
            notes.append(f"audit: {name} could not be determined: {type(error).__name__}: {error}")
            continue
        if fact is not None:  # None: the check does not apply to this case
            facts[name] = fact
    return Findings(facts=facts, notes=tuple(notes))


def mismatches(facts: Mapping[str, Fact]) -> tuple[str, ...]:
    """Return why a record with these facts is INVALID: one sentence for each that does not hold."""
    return tuple(
        f"{name}: asked for {fact.asked!r}, saw {fact.seen!r}." for name, fact in facts.items() if not fact.holds
    )
