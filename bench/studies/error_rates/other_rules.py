"""Judge samples by the rules of other tools, to compare them with our own rules. One-sided: only a slowdown alarms.

Each rule receives the samples of both sides, in any unit, without processes and sessions.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

__all__ = ["OTHER_RULES", "Rule", "bootstrap_of_medians", "mann_whitney", "pytest_benchmark"]

Rule = Callable[[Sequence[float], Sequence[float]], bool]
"""Takes base and head; returns whether the rule alarms."""
_RATIO = 0.05
_LEVEL = 0.05
_RESAMPLES = 999


def pytest_benchmark(statistic: Callable[[Sequence[float]], float], ratio: float = _RATIO) -> Rule:
    """`--benchmark-compare-fail=STATISTIC:5%`: current / baseline * 100 - 100 > 5 (pytest_benchmark/utils.py)."""
    return lambda base, head: statistic(head) / statistic(base) - 1 > ratio


def mann_whitney(base: Sequence[float], head: Sequence[float]) -> bool:
    """Two-sided Mann-Whitney test at p < 0.05, and head the slower one, as Google Benchmark's comparison does."""
    from scipy.stats import mannwhitneyu

    slower = statistics.median(head) > statistics.median(base)
    return slower and float(mannwhitneyu(base, head, alternative="two-sided").pvalue) < _LEVEL


def bootstrap_of_medians(base: Sequence[float], head: Sequence[float]) -> bool:
    """The 95 % percentile interval of the ratio of medians lies above 1."""
    import numpy as np

    generator = np.random.default_rng(0)  # the same samples must get the same answer

    def drawn(side: Sequence[float]) -> np.ndarray:
        return np.asarray(side)[generator.integers(len(side), size=(_RESAMPLES, len(side)))]

    ratios = np.median(drawn(head), axis=1) / np.median(drawn(base), axis=1)
    return bool(np.quantile(ratios, _LEVEL / 2) > 1)


OTHER_RULES: dict[str, Rule] = {
    "pytest-benchmark mean:5%": pytest_benchmark(statistics.fmean),
    "pytest-benchmark min:5%": pytest_benchmark(min),
    "pytest-benchmark median:5%": pytest_benchmark(statistics.median),
    "Mann-Whitney p<0.05": mann_whitney,
    "bootstrap of median ratio, 95 %": bootstrap_of_medians,
}
