"""Compute error rates of the gate's own rules, and of other tools', on A/A samples of one machine, by metric and for the suite.

The model: machine starts are drawn from those seen, and processes from those of their start; all cases of a suite run share
their start. Whatever the model, the binomial bound counts only comparisons that share no start.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import permutations

import msgspec

from bench.studies.error_rates.metric_rates import (
    Rate,
    against_stored,
    processes,
    rate,
)
from bench.studies.error_rates.other_rules import OTHER_RULES
from bench.studies.error_rates.samples import Samples
from hpc_core.gate.intervals import family_of
from hpc_core.gate.tolerance import BUSY_RATIOS
from hpc_core.gate.verdict import SUITE_ALPHA, share

__all__ = ["RESAMPLES", "ErrorRates", "binomial_bound", "error_rates"]

RESAMPLES = 1000
_CONFIDENCE = 0.95


class ErrorRates(msgspec.Struct, frozen=True, kw_only=True):
    """The gate's error rates on A/A samples."""

    rates: tuple[Rate, ...]
    starts: int
    gpus: int
    """Number of different GPUs."""
    tests: int
    """Number of interval tests among which the suite's alpha is divided."""
    alpha: float
    suite: float | None
    """Share of suite runs with a false alarm, under the model; None for a single start, or if no busy time is judged."""
    suite_others: dict[str, dict[str, float]]
    """By noise class and rule: the share of ordered pairs of starts with an alarm on any such metric of any case."""
    comparisons: int
    """Suite runs that share no start: starts // 2."""
    alarmed: int
    bound: float
    """Upper bound, with 95 % confidence, of the probability that a suite run has a false alarm, from these comparisons alone."""


def binomial_bound(alarmed: int, comparisons: int, confidence: float = _CONFIDENCE) -> float:
    """Return Clopper and Pearson's upper bound of a rate (Biometrika 26, 1934); 1 without a comparison."""
    from scipy.special import betaincinv

    return 1.0 if alarmed >= comparisons else float(betaincinv(alarmed + 1, comparisons - alarmed, confidence))


def error_rates(
    samples: Samples, *, alpha: float = SUITE_ALPHA, resamples: int = RESAMPLES, seed: int = 0
) -> ErrorRates:
    """Return false alarms and smallest detectable changes, by case and metric and for the suite.

    Busy time is judged as in the suite. Without it, as on a CPU, wall time is judged by its own rules.
    """
    generator = random.Random(seed)
    noisy = [(c, n) for c, n, _ in samples.series() if samples.metrics[n].noise != "exact"]
    busy = [(case, name) for case, name in noisy if samples.metrics[name].noise == "busy"]
    tests = len(busy) or len(noisy)
    level = share(tests, alpha)
    rates = [
        rate(case, name, samples.metrics[name], held, level, generator, resamples)
        for case, name, held in samples.series()
    ]
    pairs = [(first, second) for first, second in zip(samples.starts[::2], samples.starts[1::2], strict=False)]
    alarmed = sum(_suite_alarms(samples, [old.cases], new.cases, level, generator) for old, new in pairs)
    return ErrorRates(
        rates=tuple(rates),
        starts=len(samples.starts),
        gpus=len({start.gpu_uuid for start in samples.starts}),
        tests=tests,
        alpha=alpha,
        suite=_suite(samples, level, generator, resamples),
        suite_others=_suite_others(samples),
        comparisons=len(pairs),
        alarmed=alarmed,
        bound=binomial_bound(alarmed, len(pairs)),
    )


def _suite(samples: Samples, level: float, generator: random.Random, resamples: int) -> float | None:
    if len(samples.starts) < 2 or all(metric.noise != "busy" for metric in samples.metrics.values()):
        return None
    alarms = 0
    for _ in range(resamples):
        new, *old = generator.sample(samples.starts, len(samples.starts))
        alarms += _suite_alarms(samples, [start.cases for start in old], new.cases, level, generator)
    return alarms / resamples


def _suite_alarms(
    samples: Samples,
    stored: Sequence[dict[str, dict[str, tuple[float, ...]]]],
    new: dict[str, dict[str, tuple[float, ...]]],
    level: float,
    generator: random.Random,
) -> bool:
    """Return whether any busy metric of any case is REGRESSED in one run of the suite."""
    for case, metrics in new.items():
        for name, values in metrics.items():
            sessions = [start[case][name] for start in stored if name in start.get(case, {})]
            if samples.metrics[name].noise != "busy" or not sessions:
                continue
            drawn = [processes(session, generator) for session in sessions]
            found = against_stored(name, samples.metrics[name], drawn, processes(values, generator), level)
            if found.low > BUSY_RATIOS[family_of(name)]:
                return True
    return False


def _suite_others(samples: Samples) -> dict[str, dict[str, float]]:
    """Compare each start with each other one; return the share where a rule alarms on any metric of any case, by noise class."""
    pairs = list(permutations(samples.starts, 2))
    classes = sorted({metric.noise for metric in samples.metrics.values()} - {"exact"})
    if not pairs:
        return {}

    def alarms(rule: str, noise: str) -> int:
        judge = OTHER_RULES[rule]
        return sum(
            any(
                judge(old.cases[case][name], values)
                for case, metrics in new.cases.items()
                for name, values in metrics.items()
                if samples.metrics[name].noise == noise and name in old.cases.get(case, {})
            )
            for old, new in pairs
        )

    return {noise: {rule: alarms(rule, noise) / len(pairs) for rule in OTHER_RULES} for noise in classes}
