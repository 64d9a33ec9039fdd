"""Dividing a suite's false alarms over its tests. Pure.

Bonferroni: each of n tests gets alpha / n. It holds whatever the tests have in common, and ours have much: one slow machine start
moves every case at once. Rules that share more cleverly (Holm) need all verdicts before the first, and a test must end with its
own; what they would gain is small where alarms are rare. Exact metrics take no share: they do not err.
"""

from __future__ import annotations

from collections.abc import Iterable

from hpc_core.gate.verdict import MetricVerdict

__all__ = ["SUITE_ALPHA", "expected_line", "share"]

SUITE_ALPHA = 0.01
"""Expected false alarms in a run of the whole suite: one run in a hundred."""


def share(tests: int, alpha: float = SUITE_ALPHA) -> float:
    """The level of one of so many tests; of a single one if there are none."""
    return alpha / max(1, tests)


def expected_line(judged: Iterable[MetricVerdict]) -> str | None:
    """One line for the end of a run: what the intervals' levels add up to; None where nothing was judged by an interval."""
    levels = [row.alpha for row in judged if row.alpha is not None]
    if not levels:
        return None
    tests = "1 test" if len(levels) == 1 else f"{len(levels)} tests"
    return f"expected false alarms in this run: {_short(sum(levels))} ({tests} of GPU-busy time)"


def _short(value: float) -> str:
    return f"{value:.2f}" if round(value, 2) else f"{value:.1g}"
