"""The verdicts: of one metric, of a case, and how often a whole suite is wrong."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Literal

import msgspec

from hpc_core.record.units import counted

Outcome = Literal["passed", "failed", "skipped"]

SUITE_ALPHA = 0.01
"""Expected false alarms in a run of the whole suite: one run in a hundred."""


class Verdict(StrEnum):
    """The seven verdicts, the gravest first."""

    INVALID = "INVALID"
    REGRESSED = "REGRESSED"
    INCOMPATIBLE = "INCOMPATIBLE"
    NO_BASELINE = "NO_BASELINE"
    INCONCLUSIVE = "INCONCLUSIVE"
    IMPROVED = "IMPROVED"
    PASS = "PASS"  # noqa: S105 - a verdict, not a password

    @property
    def severity(self) -> int:
        """0 for PASS up to 6 for INVALID."""
        return _SEVERITY[self]

    def outcome(self, *, strict: bool = False) -> Outcome:
        """Return the test outcome. Under `strict` what cannot be compared fails instead of being skipped."""
        if self in (Verdict.PASS, Verdict.IMPROVED):
            return "passed"
        if self in (Verdict.REGRESSED, Verdict.INVALID) or strict:
            return "failed"
        return "skipped"


_SEVERITY = {verdict: number for number, verdict in enumerate(reversed(Verdict))}


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the gravest verdict; PASS for none."""
    return max(verdicts, key=lambda verdict: verdict.severity, default=Verdict.PASS)


class MetricVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """The verdict on one metric of one case."""

    metric: str
    verdict: Verdict
    old: float | int | None
    """The accepted value in `unit`; None without a comparable one."""
    new: float | int | None
    """The new value; None if the record lacks the metric."""
    unit: str
    change: float | int | None
    """new - old in `unit`."""
    ratio: float | None
    """new / old - 1; None if old is absent or zero."""
    limit: str
    """What was allowed: "+0.05 %", "equal", "at most 8.00 GiB", or "none" if nothing could be judged."""
    reason: str
    """One or two sentences with the numbers."""
    next_step: str
    """What to do; empty if nothing."""
    judged: bool = True
    """False for a new metric, which the baseline does not hold yet: it is NO_BASELINE, and the case keeps its verdict."""
    interval: tuple[float, float] | None = None
    """Where new / old - 1 lies, by the accepted sessions; None where no interval was needed."""
    alpha: float | None = None
    """The level of the interval's bounds: how often a value that is no worse than allowed is REGRESSED."""
    settled_by: str = ""
    """What would decide an INCONCLUSIVE comparison: "2 more processes"."""
    remark: str = ""
    """Why a metric passes although the value that is shown is beyond the limit; empty if it is not."""


def worst_metric(rows: Iterable[MetricVerdict]) -> Verdict:
    """Return the gravest verdict of the metrics that were judged; PASS for none."""
    return worst(row.verdict for row in rows if row.judged)


def gravest_first(row: MetricVerdict) -> tuple[bool, int, float, str]:
    """Return a key that sorts metrics: the gravest and the largest change first, new metrics last."""
    return not row.judged, -row.verdict.severity, -abs(row.ratio or 0.0), row.metric


class Excuse(msgspec.Struct, frozen=True, kw_only=True):
    """Why a REGRESSED metric does not fail its test: a waiver, or an acceptance in the same pull request."""

    metric: str
    text: str
    """"waived by jane until 2027-01-31 (12 days left): …" or "accepted in this pull request: …"."""


class Judgement(msgspec.Struct, frozen=True, kw_only=True):
    """The verdict on a case: that of its worst metric, or of what prevents a comparison of all metrics."""

    case: str
    verdict: Verdict
    metrics: tuple[MetricVerdict, ...]
    """The gravest first, then by name; new metrics last."""
    moved: tuple[str, ...]
    """Packages and settings that moved since the baseline and can have changed the case: "transformers 5.23.0 → 5.24.0"."""
    headline: str
    """Starts with the metric and the size, since pytest cuts summaries: "peak_bytes +1.88 GiB, limit +0.05 %"."""
    reason: str
    """The reason of the verdict, in sentences."""
    next_step: str
    baseline_path: str
    """Where the baseline lies or would lie, below the folder of baselines: `<machine>/<shape>/<variant>.json`."""
    broken: bool = False
    """The run itself failed, so there was nothing to judge."""
    excuses: tuple[Excuse, ...] = ()
    """REGRESSED metrics that do not fail the test; the verdict stays what it is."""
    remarks: tuple[str, ...] = ()
    """What else a reader must know of how it was judged, a sentence each."""

    def outcome(self, *, strict: bool = False) -> Outcome:
        """Return the test outcome: that of the verdict, unless every REGRESSED metric is excused; then that of the gravest other."""
        excused = {excuse.metric for excuse in self.excuses}
        rest = [row for row in self.metrics if row.verdict is not Verdict.REGRESSED or row.metric not in excused]
        if self.verdict is not Verdict.REGRESSED or len(rest) == len(self.metrics):
            return self.verdict.outcome(strict=strict)
        least = Verdict.PASS if any(row.old is not None for row in self.metrics) else Verdict.NO_BASELINE
        return worst((least, worst_metric(rest))).outcome(strict=strict)


def share(tests: int, alpha: float = SUITE_ALPHA) -> float:
    """Return the level of one of so many tests; of a single one if there are none.

    Bonferroni: each of n tests gets alpha / n. That holds whatever the tests have in common, and ours have much: one slow
    machine start moves every case at once. Rules that share better (Holm) need all verdicts before the first, but a test must
    end with its own. Exact metrics take no share: they do not err.
    """
    return alpha / max(1, tests)


def expected_line(judged: Iterable[MetricVerdict]) -> str | None:
    """Return one line for the end of a run: the sum of the intervals' levels; None where nothing was judged by an interval."""
    levels = [row.alpha for row in judged if row.alpha is not None]
    if not levels:
        return None
    total = sum(levels)
    shown = f"{total:.2f}" if round(total, 2) else f"{total:.1g}"
    return f"expected false alarms in this run: {shown} ({counted(len(levels), 'test')} of time and energy)"
