"""Measure both sides of a comparison: pairs of fresh processes in ABBA order, within a budget of time.

Every case gets its first pair before any gets its second, and the next pair goes to the case that has cost least so far, so exact
metrics and most timed ones are decided even if the budget ends early. The first pair measures everything. Further pairs measure times
only, since counts are the same in each process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
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
from hpc_core.gate.exit_code import ExitCode
from hpc_core.gate.verdict import Verdict
from hpc_core.record.record import Circumstances, Record

SideName = Literal["base", "head"]
Run = Callable[[SideName, Case, bool], Record]
"""Runs a case on a side in a fresh process. True: measure times only, since the side has measured the case in full."""
_SIDES: tuple[SideName, SideName] = ("base", "head")
_NOT_HERE = ("missing_library", "missing_data")


class CaseResult(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one case."""

    case: str
    pairs: int
    error: Literal["broken", "invalid", "missing", "unmeasured"] | None = None
    """Why there are no rows: a run broke or is INVALID, both sides lack a package or data, or no pair was run."""
    reason: str = ""
    rows: tuple[Difference, ...] = ()


class Trial:
    """Collects records of a case in pairs, and decides each timed metric as soon as the pairs allow it."""

    def __init__(self, case: Case, rule: Rule) -> None:
        self.case = case
        self._rule = rule
        self._checks: dict[str, tuple[Check, int]] = {}
        """The last check of each metric, and the number of pairs that it used."""
        self.records: dict[SideName, list[Record]] = {"base": [], "head": []}
        self.refused: dict[SideName, str] = {}
        """Why a side cannot run this case at all, before anything was launched."""
        self.seconds = 0.0
        """The seconds that the last pair took."""
        self.spent_s = 0.0
        """The seconds that all pairs took."""

    @property
    def pairs(self) -> int:
        """The number of complete pairs."""
        return min(map(len, self.records.values()))

    @property
    def order(self) -> tuple[SideName, SideName]:
        """The order of sides in the next pair: base head, head base, base head …, so that drift favours neither."""
        return _SIDES if self.pairs % 2 == 0 else (_SIDES[1], _SIDES[0])

    @property
    def failed(self) -> bool:
        """Whether a side gave no numbers."""
        return bool(self.refused) or any(record.status != "ok" for side in self.records.values() for record in side)

    @property
    def timed(self) -> tuple[str, ...]:
        """The metrics that pairs decide, once there is one pair.

        Without a soak's wall time: a soak is about memory, and its pairs take minutes.
        """
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
        """Return one value per process of the complete pairs."""
        return [float(record.metrics[name].value) for record in self.records[side][: self.pairs]]

    def check(self, metrics_judged: int) -> None:
        """Judge each undecided metric by the pairs so far. `metrics_judged` metrics of the whole run share alpha."""
        for name in self.timed:
            if name in self._checks and decided(self._checks[name][0]):
                continue
            rule = self._rule.sequential(self.case, name, self.records["base"][0].metrics[name], metrics_judged)
            self._checks[name] = rule.check(self.values("base", name), self.values("head", name)), self.pairs

    @property
    def finished(self) -> bool:
        """Whether another pair would decide nothing."""
        if self.failed:
            return True
        return self.pairs > 0 and all(name in self._checks and decided(self._checks[name][0]) for name in self.timed)

    def result(self, why: str) -> CaseResult:
        """Return the result so far; `why` explains, for undecided metrics, why there were no more pairs."""
        if self.failed:
            return self._failed_result()
        if not self.pairs:
            return CaseResult(case=self.case.id, pairs=0, error="unmeasured", reason=why)
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
        """Return the worst failure, with its side."""
        reasons: list[str] = []
        kinds: list[str] = []
        for side in _SIDES:
            bad = next((record for record in self.records[side] if record.status != "ok"), None)
            if side in self.refused:
                kinds.append("broken")
                reasons.append(f"{side}: {self.refused[side]}")
            elif bad is not None:
                is_missing = bad.failure is not None and bad.failure.kind in _NOT_HERE
                kinds.append("invalid" if bad.failure is None else "missing" if is_missing else "broken")
                reasons.append(problem_of(side, bad))
        if len(kinds) == 1:
            reasons.append("The other side ran." if self._other_ran() else "")
        lacking = kinds == ["missing", "missing"]
        kind: Literal["broken", "invalid", "missing"] = (
            "missing" if lacking else "invalid" if set(kinds) == {"invalid"} else "broken"
        )
        reason = " ".join(f"{text.rstrip('.')}." for text in reasons if text)
        return CaseResult(case=self.case.id, pairs=self.pairs, error=kind, reason=reason)

    def _other_ran(self) -> bool:
        return any(record.status == "ok" for side in self.records.values() for record in side)

    def verdicts(self) -> dict[str, Verdict]:
        """Return the verdicts so far, for the progress."""
        return {name: check.verdict for name, (check, _) in self._checks.items() if check.verdict is not None}


def problem_of(side: str, record: Record) -> str:
    """Return the side and why its record has no numbers; "" for a sound record."""
    if record.failure is not None:
        return f"{side}: {record.failure.kind} in {record.failure.phase}: {record.failure.message}"
    return f"{side}: invalid: {' '.join(record.reasons)}" if record.reasons else ""


def _soaks(case: Case) -> bool:
    return isinstance(case.workload, FinetuneSpec) and case.workload.soaks


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The cases, the rule and the budget."""

    cases: tuple[Case, ...]
    rule: Rule = Rule()
    budget_s: float = 600.0
    """No pair starts that would probably end after it."""
    spent_s: float = 0.0
    """The part of the budget that was spent before measuring."""
    exact_only: bool = False
    """Run one pair per case, and leave timed metrics out."""
    refused: dict[str, dict[SideName, str]] = {}
    """Why a side cannot run a case, by case; known before anything was launched."""


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of a comparison."""

    results: tuple[CaseResult, ...]
    alpha: float
    metrics_judged: int
    """Timed metrics that share alpha."""
    seconds: float
    around: dict[SideName, Circumstances]
    """The circumstances of each side's first record."""

    def exit_code(self, *, strict: bool = False) -> ExitCode:
        """1: something is worse or INVALID; 11: a run broke; 10, under strict: something is undecided; 0 otherwise."""
        errors = {result.error for result in self.results}
        verdicts = {row.verdict for result in self.results for row in result.rows}
        if Verdict.REGRESSED in verdicts or "invalid" in errors:
            return ExitCode.FAILED
        if "broken" in errors:
            return ExitCode.BROKEN
        undecided = {"missing", "unmeasured"} & errors or {Verdict.INCONCLUSIVE, Verdict.INCOMPATIBLE} & verdicts
        return ExitCode.NOT_COMPARABLE if strict and undecided else ExitCode.OK


class _Progress:
    def __init__(self, tell: Callable[[str], None], cases: Sequence[Case]) -> None:
        self._tell = tell
        self._number = {case.id: number for number, case in enumerate(cases, start=1)}

    def report(self, trial: Trial, text: str) -> None:
        number = self._number[trial.case.id]
        self._tell(f"[{number}/{len(self._number)}] {trial.case.id}: {text}")


def compare(
    plan: Plan, run: Run, tell: Callable[[str], None], *, check: Callable[[], None] = lambda: None
) -> Comparison:
    """Measure all cases on both sides until everything is decided or the budget is spent.

    Args:
        plan: cases, rule and budget.
        run: runs a case on a side.
        tell: called with a line of progress after each pair.
        check: called after each pair; raises if a tree has changed since the run began.

    Raises:
        LaunchError: no worker can be started at all.
        KeyboardInterrupt: after the worker has ended.
    """
    began = time.monotonic()
    deadline = began + plan.budget_s - plan.spent_s
    progress = _Progress(tell, plan.cases)
    trials = [Trial(case, plan.rule) for case in plan.cases]
    for trial in trials:
        trial.refused = dict(plan.refused.get(trial.case.id, {}))
        if trial.refused:
            progress.report(trial, "not run: one side does not know it")
        elif time.monotonic() < deadline:
            _pair(trial, run, progress)
            check()
    judged = 0 if plan.exact_only else sum(len(trial.timed) for trial in trials)
    while not plan.exact_only and (following := _next(trials, deadline)) is not None:
        _pair(following, run, progress, judged)
        check()
    why = f"the time budget of {plan.budget_s:.0f} s ended first; raise --budget."
    return Comparison(
        results=tuple(_without_times(trial.result(why)) if plan.exact_only else trial.result(why) for trial in trials),
        alpha=plan.rule.alpha,
        metrics_judged=judged,
        seconds=time.monotonic() - began,
        around=_around(trials),
    )


def _next(trials: Sequence[Trial], deadline: float) -> Trial | None:
    """Return the undecided case that has cost least so far and would end in time, so that a long case does not starve the others."""
    now = time.monotonic()
    fit = [trial for trial in trials if trial.pairs and not trial.finished and now + trial.seconds <= deadline]
    return min(fit, key=lambda trial: trial.spent_s + trial.seconds, default=None)


def _pair(trial: Trial, run: Run, progress: _Progress, judged: int = 1) -> None:
    began = time.monotonic()
    again = trial.pairs > 0
    for side in trial.order:
        record = run(side, trial.case, again)
        trial.records[side].append(record)
    trial.seconds = time.monotonic() - began
    trial.spent_s += trial.seconds
    if trial.failed:
        progress.report(trial, "no numbers on one side")
        return
    before = trial.verdicts()
    if trial.pairs > 1:
        trial.check(judged)
    new = [f"{name} {verdict}" for name, verdict in trial.verdicts().items() if name not in before]
    progress.report(trial, f"pair {trial.pairs}, {trial.seconds:.1f} s{'; ' if new else ''}{', '.join(new)}")


def _without_times(result: CaseResult) -> CaseResult:
    rows = tuple(row for row in result.rows if row.noise == "exact" and row.verdict is not None)
    return msgspec.structs.replace(result, rows=rows)


def _around(trials: Sequence[Trial]) -> dict[SideName, Circumstances]:
    found: dict[SideName, Circumstances] = {}
    for trial in trials:
        for side, records in trial.records.items():
            for record in records:
                found.setdefault(side, record.circumstances)
    return found
