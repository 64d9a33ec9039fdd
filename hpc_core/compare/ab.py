"""Measure both sides of a comparison: pairs of fresh processes in ABBA order, within a budget of time.

Every case gets its first pair before any gets its second, and the next pair goes to the case that has cost least so far: so exact
metrics, and most of the timed ones, are decided even where the budget ends early. The first pair measures everything; further ones
only times, since what is counted is the same in each process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import msgspec

from hpc_core.case.case import Case
from hpc_core.compare.differences import Rule
from hpc_core.compare.trial import CaseResult, SideName, Trial
from hpc_core.gate.exit_code import ExitCode
from hpc_core.gate.verdict import Verdict
from hpc_core.record.record import Circumstances, Record

Run = Callable[[SideName, Case, bool], Record]
"""Runs a case on a side, in a fresh process. True: times only, since the side has measured the case in full."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure and how long."""

    cases: tuple[Case, ...]
    rule: Rule = Rule()
    budget_s: float = 600.0
    """No pair is begun that would probably end after it."""
    spent_s: float = 0.0
    """What of the budget was spent before measuring."""
    exact_only: bool = False
    """One pair a case, and timed metrics are left out."""
    refused: dict[str, dict[SideName, str]] = {}
    """By case: why a side cannot run it, known before anything was launched."""


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of a comparison."""

    results: tuple[CaseResult, ...]
    alpha: float
    metrics_judged: int
    """Timed metrics that share alpha."""
    seconds: float
    around: dict[SideName, Circumstances]
    """Of the first record of each side."""

    def exit_code(self, *, strict: bool = False) -> ExitCode:
        """1: something is worse or not what was asked; 11: a run broke; 10, under strict: something is undecided; 0 otherwise."""
        failures = {result.failure for result in self.results}
        verdicts = {row.verdict for result in self.results for row in result.rows}
        if Verdict.REGRESSED in verdicts or "invalid" in failures:
            return ExitCode.FAILED
        if "broken" in failures:
            return ExitCode.BROKEN
        undecided = {"missing", "unmeasured"} & failures or {Verdict.INCONCLUSIVE, Verdict.INCOMPATIBLE} & verdicts
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
    """Measure all cases on both sides until everything is decided, or the budget is spent.

    Args:
        plan: cases, rule and budget.
        run: runs a case on a side.
        tell: called with a line of progress after each pair.
        check: called after each pair; raises if what is measured has changed meanwhile.

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
    """Return the undecided case that has cost least so far and would end in time: a long one does not starve the others."""
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
