"""Which version of a package first moved a metric: binary search, each step an A/B against the good version.

A version is bad if its value lies nearer to the bad end than to the good one: beyond half of the change between them. So a small drift
is not mistaken for the jump. Versions that give no number are skipped, as `git bisect skip` does.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec

from hpc_core.case.case import Case
from hpc_core.case.errors import SpecError
from hpc_core.compare.ab import Run, SideName, problem_of
from hpc_core.compare.differences import Rule, is_judged_in_pairs
from hpc_core.compare.sequential import Check, Sequential
from hpc_core.gate.verdict import Verdict
from hpc_core.record import units as sizes
from hpc_core.record.record import Metric, Record

Word = Literal["good", "bad", "skip"]
_SHOWN = 12


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """The result of an A/B of one candidate against the good end."""

    word: Word
    base: float | None = None
    """The good end's value, measured together with the candidate's. Both are medians of processes."""
    head: float | None = None
    text: str
    """The change in numbers, or why there is none."""


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One candidate that was tried, and its answer."""

    index: int
    answer: Answer


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a search."""

    first: int
    """The first candidate known to be bad."""
    suspects: tuple[int, ...]
    """Candidates before it that gave no number: the change may have come with any of them. Empty if `first` is certain."""
    steps: tuple[Step, ...]


def search(count: int, classify: Callable[[int], Answer]) -> Found:
    """Return the first bad one of `count` candidates, oldest first; the last one is known to be bad.

    The version before the first candidate is known to be good. The candidate nearest to the middle is tried next.

    Raises:
        ValueError: there is no candidate.
    """
    if count < 1:
        raise ValueError("Nothing to search: there is no candidate.")
    good, bad = -1, count - 1
    skipped: set[int] = set()
    steps: list[Step] = []
    while untried := [index for index in range(good + 1, bad) if index not in skipped]:
        middle = (good + bad) / 2
        index = min(untried, key=lambda one: (abs(one - middle), one))
        answer = classify(index)
        steps.append(Step(index=index, answer=answer))
        if answer.word == "skip":
            skipped.add(index)
        elif answer.word == "good":
            good = index
        else:
            bad = index
    return Found(first=bad, suspects=tuple(range(good + 1, bad)), steps=tuple(steps))


class Question:
    """Compares one metric of one case on both sides, by pairs of processes."""

    def __init__(self, case: Case, metric: str, rule: Rule, run: Run) -> None:
        self._case = case
        self._metric = metric
        self._rule = rule
        self._run = run
        self._ends: tuple[float, float] | None = None
        """The metric at the good and at the bad end."""

    def ends(self, good: str, bad: str) -> Answer:
        """Measure the bad end as head. Afterwards `ask` can judge candidates.

        Raises:
            SpecError: an end gives no number, the metric is not judged, or good and bad do not differ beyond noise.
        """
        base, head, problem = self._pair()
        if problem:
            raise SpecError(f"Nothing to bisect: {problem}")
        self._check_metric(base)
        self._check_metric(head)
        metric = self._of(base)
        if metric.noise == "exact":
            old, new = float(metric.value), float(self._of(head).value)
            if old == new:
                value = sizes.quantity(metric.value, metric.unit)
                raise SpecError(
                    f"{good} and {bad} do not differ: {self._metric} of {self._case.id} is {value} at both ends. "
                    "Nothing to bisect; choose ends or a metric that differ: hpc-core ab shows them."
                )
            self._ends = old, new
            return Answer(word="bad", base=metric.value, head=self._of(head).value, text=self._text(old, new, metric))
        tolerance = self._rule.tolerance(self._case, self._metric, metric)
        befores, afters, check, problem = self._timed(tolerance, (base, head), swap=False)
        old, new = statistics.median(befores), statistics.median(afters)
        if problem or check is None or check.verdict not in (Verdict.REGRESSED, Verdict.IMPROVED):
            why = " ".join(filter(None, (problem, "" if check is None else check.required, "Nothing to bisect.")))
            raise SpecError(
                f"{good} and {bad} do not differ beyond noise: {self._text(old, new, metric)} of {self._case.id} over {len(befores)} "
                f"pairs, limit {sizes.percent(tolerance)}. {why}"
            )
        ratio = statistics.geometric_mean(afters) / statistics.geometric_mean(befores)
        self._ends = old, old * ratio
        return Answer(word="bad", base=old, head=new, text=f"{self._text(old, new, metric)}, {len(befores)} pairs")

    def ask(self) -> Answer:
        """Judge whether the present head lies beyond half of the change between the ends."""
        assert self._ends is not None, "call ends first"
        base, head, problem = self._pair()
        if problem:
            return Answer(word="skip", text=problem)
        if self._metric not in base.metrics or self._metric not in head.metrics:
            return Answer(word="skip", text=f"it has no {self._metric}")
        metric = self._of(base)
        good, bad = self._ends
        if metric.noise == "exact":
            old, new = metric.value, self._of(head).value
            beyond = abs(new - bad) < abs(new - good)
            return Answer(word="bad" if beyond else "good", base=old, head=new, text=self._text(old, new, metric))
        worse = bad > good
        half = (max(good, bad) / min(good, bad) - 1) / 2
        befores, afters, check, problem = self._timed(half, (base, head), swap=not worse)
        old, new = statistics.median(befores), statistics.median(afters)
        text = f"{self._text(old, new, metric)}, {len(befores)} pairs"
        if problem or check is None or check.verdict in (None, Verdict.INCONCLUSIVE):
            return Answer(word="skip", base=old, head=new, text=f"undecided: {problem or text}")
        word: Word = "bad" if check.verdict is Verdict.REGRESSED else "good"
        return Answer(word=word, base=old, head=new, text=text)

    def _text(self, old: float, new: float, metric: Metric) -> str:
        change = f" ({new / old - 1:+.1%})".replace("%", " %") if old and metric.noise != "exact" else ""
        size = f" ({sizes.change(new - old, metric.unit)})" if metric.noise == "exact" and old != new else change
        return f"{self._metric} {sizes.pair(old, new, metric.unit)}{size}"

    def _of(self, record: Record) -> Metric:
        return record.metrics[self._metric]

    def _check_metric(self, record: Record) -> None:
        fit = [
            name
            for name, metric in sorted(record.metrics.items())
            if is_judged_in_pairs(metric) or (metric.noise == "exact" and metric.gated)
        ]
        if self._metric in fit:
            return
        state = "is shown and not judged" if self._metric in record.metrics else "is not measured"
        more = f" and {len(fit) - _SHOWN} more" if len(fit) > _SHOWN else ""
        raise SpecError(
            f"{self._metric} {state} for {self._case.id}. It has: {', '.join(fit[:_SHOWN])}{more}; see hpc-core run {self._case.id}."
        )

    def _pair(self, *, head_first: bool = False, again: bool = False) -> tuple[Record, Record, str]:
        order: Sequence[SideName] = ("head", "base") if head_first else ("base", "head")
        records = {side: self._run(side, self._case, again) for side in order}
        return (
            records["base"],
            records["head"],
            "; ".join(filter(None, (problem_of(side, records[side]) for side in ("base", "head")))),
        )

    def _timed(
        self, tolerance: float, first: tuple[Record, Record], *, swap: bool
    ) -> tuple[list[float], list[float], Check | None, str]:
        """Return the values of base and of head, the last check and the problem, after as many pairs as a verdict takes.

        With `swap`, base is judged against head, for a metric that got smaller.
        """
        rule = Sequential(
            alpha=self._rule.alpha,
            tolerance=tolerance,
            least_pairs=self._rule.least_pairs,
            most_pairs=self._rule.most_pairs,
        )
        befores, afters = [float(self._of(first[0]).value)], [float(self._of(first[1]).value)]
        check = None
        while check is None or check.verdict is None:
            base, head, problem = self._pair(head_first=len(befores) % 2 == 1, again=True)
            if not problem and not (self._metric in base.metrics and self._metric in head.metrics):
                problem = f"a further process has no {self._metric}"
            if problem:
                return befores, afters, None, problem
            befores.append(float(self._of(base).value))
            afters.append(float(self._of(head).value))
            check = rule.check(afters, befores) if swap else rule.check(befores, afters)
        return befores, afters, check, ""
