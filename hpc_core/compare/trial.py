"""One case measured on both sides, pair after pair: its records, what is decided, what went wrong."""

from __future__ import annotations

from typing import Literal

import msgspec

from hpc_core.case.case import Case
from hpc_core.case.workloads import FinetuneSpec
from hpc_core.compare.differences import (
    Difference,
    Rule,
    decided,
    exact_rows,
    is_judged_in_pairs,
    timed_row,
    unjudged_rows,
)
from hpc_core.compare.sequential import Check
from hpc_core.gate.verdict import Verdict
from hpc_core.record.record import Record

SideName = Literal["base", "head"]
_SIDES: tuple[SideName, SideName] = ("base", "head")
_NOT_HERE = ("missing_library", "missing_data")


class CaseResult(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one case at the end."""

    case: str
    pairs: int
    failure: Literal["broken", "invalid", "missing", "unmeasured"] | None = msgspec.field(name="trouble", default=None)
    """Why it has no rows: a run broke, ran something else than asked, lacks a package or data on both sides, or never began."""
    reason: str = ""
    rows: tuple[Difference, ...] = ()


class Trial:
    """Collects records of a case in pairs, and decides each timed metric as soon as the pairs allow it."""

    def __init__(self, case: Case, rule: Rule) -> None:
        self.case = case
        self._rule = rule
        self._checks: dict[str, tuple[Check, int]] = {}
        """By metric: the last interim analysis, and the pairs it rests on."""
        self.records: dict[SideName, list[Record]] = {"base": [], "head": []}
        self.refused: dict[SideName, str] = {}
        """Why a side cannot run this case at all, before anything was launched."""
        self.seconds = 0.0
        """What the last pair took."""
        self.spent_s = 0.0
        """What all pairs took."""

    @property
    def pairs(self) -> int:
        """Complete ones."""
        return min(map(len, self.records.values()))

    @property
    def order(self) -> tuple[SideName, SideName]:
        """Which side the next pair starts with: base head, head base, base head …, so that drift favours neither."""
        return _SIDES if self.pairs % 2 == 0 else (_SIDES[1], _SIDES[0])

    @property
    def failed(self) -> bool:
        """Whether a side gave no numbers."""
        return bool(self.refused) or any(record.status != "ok" for side in self.records.values() for record in side)

    @property
    def timed(self) -> tuple[str, ...]:
        """Metrics that pairs decide, once there is one pair. Not a soak's wall time: a soak is about memory, and its pairs take minutes."""
        if self.failed or not self.pairs:
            return ()
        base, head = self.records["base"][0].metrics, self.records["head"][0].metrics
        everywhere = set.intersection(*(set(record.metrics) for side in self.records.values() for record in side))
        return tuple(
            name
            for name in sorted(everywhere)
            if is_judged_in_pairs(base[name])
            and is_judged_in_pairs(head[name])
            and not (_soaks(self.case) and base[name].noise == "wall")
        )

    def values(self, side: SideName, name: str) -> list[float]:
        """Return one value a process, of the complete pairs."""
        return [float(record.metrics[name].value) for record in self.records[side][: self.pairs]]

    def check(self, metrics_judged: int) -> None:
        """Judge what is still undecided by the pairs so far; `metrics_judged` in the whole run share alpha."""
        for name in self.timed:
            if name in self._checks and decided(self._checks[name][0]):
                continue
            rule = self._rule.sequential(self.case, name, self.records["base"][0].metrics[name], metrics_judged)
            self._checks[name] = rule.check(self.values("base", name), self.values("head", name)), self.pairs

    @property
    def finished(self) -> bool:
        """Whether another pair would decide nothing more."""
        if self.failed:
            return True
        return self.pairs > 0 and all(name in self._checks and decided(self._checks[name][0]) for name in self.timed)

    def result(self, why: str) -> CaseResult:
        """Return what is known; `why` explains, for what is undecided, why there were no more pairs."""
        if self.failed:
            return self._failed_result()
        if not self.pairs:
            return CaseResult(case=self.case.id, pairs=0, failure="unmeasured", reason=why)
        base, head = (self.records[side][: self.pairs] for side in _SIDES)
        rows = exact_rows(self.case, base, head)
        rows += [self._timed_row(name, why) for name in self.timed]
        return CaseResult(case=self.case.id, pairs=self.pairs, rows=(*rows, *unjudged_rows(base, head, self.timed)))

    def _timed_row(self, name: str, why: str) -> Difference:
        check, pairs = self._checks.get(name, (None, self.pairs))
        metric = self.records["base"][0].metrics[name]
        tolerance = self._rule.tolerance(self.case, name, metric)
        values = [self.values(side, name)[:pairs] for side in _SIDES]
        return timed_row(name, metric, values[0], values[1], check, tolerance, why)

    def _failed_result(self) -> CaseResult:
        """Return the gravest of what happened, with the side it happened on."""
        reasons: list[str] = []
        kinds: list[str] = []
        for side in _SIDES:
            bad = next((record for record in self.records[side] if record.status != "ok"), None)
            if side in self.refused:
                kinds.append("broken")
                reasons.append(f"{side}: {self.refused[side]}")
            elif bad is not None and bad.failure is not None:
                kinds.append("missing" if bad.failure.kind in _NOT_HERE else "broken")
                reasons.append(f"{side}: {bad.failure.kind} in {bad.failure.phase}: {bad.failure.message}")
            elif bad is not None:
                kinds.append("invalid")
                reasons.append(f"{side}: invalid: {' '.join(bad.reasons)}")
        if len(kinds) == 1:
            reasons.append("The other side ran." if self._other_ran() else "")
        lacking = kinds == ["missing", "missing"]
        kind: Literal["broken", "invalid", "missing"] = (
            "missing" if lacking else "invalid" if set(kinds) == {"invalid"} else "broken"
        )
        reason = " ".join(f"{text.rstrip('.')}." for text in reasons if text)
        return CaseResult(case=self.case.id, pairs=self.pairs, failure=kind, reason=reason)

    def _other_ran(self) -> bool:
        return any(record.status == "ok" for side in self.records.values() for record in side)

    def verdicts(self) -> dict[str, Verdict]:
        """Return what is decided so far, for the progress."""
        return {name: check.verdict for name, (check, _) in self._checks.items() if check.verdict is not None}


def _soaks(case: Case) -> bool:
    return isinstance(case.workload, FinetuneSpec) and case.workload.soaks
