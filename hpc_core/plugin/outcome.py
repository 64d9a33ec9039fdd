"""Turn a row into a test's outcome and its text, and all outcomes into the exit code of a run."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, NoReturn

import msgspec
import pytest

from hpc_core.gate.exit_code import ExitCode
from hpc_core.gate.verdict import Judgement, MetricVerdict, Verdict
from hpc_core.record import units as sizes
from hpc_core.report.command import Command
from hpc_core.report.entry import Row

FailureKind = Literal["worse", "broken", "not comparable", "other"]
"""Why a test failed: a number, a broken run, nothing to compare with, or the test's own code."""
_TO_INSTALL = ("missing_library", "missing_data")
_BAD = (Verdict.REGRESSED, Verdict.INVALID)


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of a test, with the text that pytest shows."""

    result: Literal["passed", "failed", "skipped"]
    kind: FailureKind = "other"
    text: str = ""

    def apply(self) -> None:
        """Fail or skip the running test, or do nothing if it passed."""
        if self.result == "failed":
            self._fail()
        if self.result == "skipped":
            pytest.skip(self.text)

    def _fail(self) -> NoReturn:
        __tracebackhide__ = True
        pytest.fail(self.text, pytrace=False)


def outcome_of(row: Row, *, strict: bool, command: Command) -> Outcome:
    """Return the outcome of a case's row; `command` runs only this case."""
    failure, judgement = row.record.failure, row.judgement
    again = f"Run it again: {command.run}"
    if failure is not None:
        headline = f"{failure.kind} in {failure.phase}: {failure.message}"
        if failure.kind in _TO_INSTALL:
            missing: Literal["failed", "skipped"] = "failed" if strict else "skipped"
            return Outcome(result=missing, kind="not comparable", text=f"{row.case}: {headline}")
        return Outcome(result="failed", kind="broken", text=_paragraph(headline, failure.detail, again))
    if row.refused is not None:
        return Outcome(result="failed", kind="worse", text=_paragraph(row.refused, again))
    if judgement is None:
        return Outcome(result="passed")
    result = judgement.outcome(strict=strict)
    if row.expired and result != "failed":
        return Outcome(result="failed", kind="worse", text=_paragraph(*row.expired, again))
    if result == "passed":
        return Outcome(result="passed")
    if result == "skipped":
        return Outcome(result="skipped", kind="not comparable", text=f"{judgement.verdict}: {judgement.headline}")
    kind: FailureKind = "worse" if judgement.verdict in _BAD else "not comparable"
    return Outcome(result="failed", kind=kind, text=_explained(row, judgement, again, command))


def _paragraph(*parts: str) -> str:
    return "\n".join(part for part in parts if part)


def _explained(row: Row, judgement: Judgement, again: str, command: Command) -> str:
    """Return headline, cause, each bad metric, suspects, the next step, and the commands to accept and to run again."""
    # A reason that holds for the whole case, such as a missing baseline, is not repeated for each metric.
    alike = [each for each in judgement.metrics if each.verdict is judgement.verdict]
    bad = [each for each in alike if each.reason != judgement.reason or each.change is not None]
    moved = f"Suspects, moved since the baseline: {', '.join(judgement.moved)}" if judgement.moved and bad else ""
    reason = "" if bad or judgement.reason == judgement.headline else judgement.reason
    compared = any(each.change is not None for each in bad) or judgement.verdict not in _BAD
    accept = f"Accept it: {command.accept}" if compared and command.accept else ""
    step = "" if compared else command.in_step(judgement.next_step)
    lines = [_metric_line(judgement.case, each) for each in bad]
    more = [f"  at the peak: {line}" for line in row.grown]
    why = () if row.cause is None else tuple(f"Why: {line}" for line in row.cause.lines)
    excused = [f"  {excuse.metric}: {excuse.text}" for excuse in judgement.excuses]
    return _paragraph(
        judgement.headline,
        reason,
        *why,
        *lines,
        *more,
        *excused,
        *judgement.remarks,
        *row.expired,
        moved,
        f"Baseline: {judgement.baseline_path}",
        step,
        accept,
        again,
        row.search,
    )


def _metric_line(case: str, row: MetricVerdict) -> str:
    if row.new is None or row.change is None or row.old is None:
        return f"  {case} {row.metric}: {row.reason}"
    percent = "" if row.ratio is None else f", {sizes.percent(row.ratio)}"
    values = sizes.pair(row.old, row.new, row.unit)
    return f"  {case} {row.metric}: {values} ({sizes.change(row.change, row.unit)}{percent}), limit {row.limit}"


def properties(row: Row) -> list[tuple[str, object]]:
    """Return the properties of a test in JUnit's XML: case, digest, verdict, headline, cause, and each metric's value."""
    found: list[tuple[str, object]] = [
        ("perf_case", row.case),
        ("perf_digest", row.record.case.digest),
        ("perf_verdict", row.verdict),
    ]
    if row.judgement is not None:
        found.append(("perf_headline", row.judgement.headline))
    if row.cause is not None:
        found.append(("perf_cause", " | ".join(row.cause.lines)))
    if row.record.status == "ok":
        found += [(f"perf_metric.{name}", metric.value) for name, metric in row.record.metrics.items()]
    return found


def exit_code(kinds: Collection[FailureKind]) -> int:
    """Return 1 if anything got worse or another test failed, else 11 if a run broke, else 10."""
    if set(kinds) <= {"not comparable"}:
        return ExitCode.NOT_COMPARABLE
    return ExitCode.BROKEN if set(kinds) <= {"not comparable", "broken"} else ExitCode.FAILED


def bisect_exit_code(exit_status: int, kinds: Collection[FailureKind]) -> ExitCode:
    """Return what `git bisect run` reads as bad, good, or a commit that cannot be tested.

    A commit is bad only if a number got worse. Code that does not import, a broken run, and a missing baseline say nothing
    about it.
    """
    if "worse" in kinds:
        return ExitCode.FAILED
    return ExitCode.OK if exit_status == ExitCode.OK and not kinds else ExitCode.CANNOT_TEST
