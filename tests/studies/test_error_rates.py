"""Simulations: each rule's false alarms stay within its stated alpha whatever the noise, and it has the stated power.

A rule that keeps its alpha alarms binomially: in more than k of n runs with probability P(Bin(n, alpha) > k). Each bound here has a k for
which that is below 1e-7, and no test has ten of them: with any seed, a correct rule fails a test with probability below 1e-6. Power and
passing are asserted with the same margin, far below what is observed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
from scipy.special import bdtrc

from bench.studies.error_rates.metric_rates import history_interval
from bench.studies.error_rates.other_rules import OTHER_RULES
from hpc_core.compare.sequential import Sequential
from hpc_core.gate.intervals import SPREADS, Interval, three_way
from hpc_core.gate.tolerance import BUSY_RATIOS, PAIRED_RATIO
from hpc_core.gate.verdict import SUITE_ALPHA, Verdict, share
from hpc_core.record.metrics import Family
from tests.gate.judging import busy_interval, paired_interval

ALPHA = 0.05
RUNS = 1500
PROCESSES = 3
WITHIN = 0.0015
Draws = Sequence[Sequence[float]]


def most(runs: int, alpha: float) -> int:
    """The number of alarms that a correct rule exceeds with probability below 1e-7."""
    return next(k for k in range(runs + 1) if bdtrc(k, runs, alpha) < 1e-7)


def sessions(
    seed: int, count: int, *, between: float, within: float = WITHIN, spikes: float = 0.0, drift: float = 0.0
) -> Iterator[list[list[float]]]:
    """Runs of `count` sessions without any change; the last one is the new one."""
    random = np.random.default_rng(seed)
    shape = (RUNS, count, PROCESSES)
    logs = random.normal(0, between, (RUNS, count, 1)) + random.normal(0, within, shape)
    logs += 0.05 * (random.random(shape) < spikes)
    logs += np.cumsum(random.normal(0, drift, (RUNS, count, 1)), axis=1)
    yield from np.exp(logs).tolist()


def alarms(draws: Iterator[list[list[float]]], interval: Callable[[list[float], Draws], Interval], limit: float) -> int:
    """The number of runs whose whole interval lies above the limit."""
    return sum(interval(new, old).low > limit for *old, new in draws)


def by_data(new: Sequence[float], old: Draws) -> Interval:
    return busy_interval(new, old, SPREADS["train"], ALPHA)


@pytest.mark.parametrize(("between", "count"), [(0.0, 5), (0.003, 8), (0.01, 5), (0.03, 5), (0.03, 8)])
def test_five_stored_sessions_keep_alpha(between: float, count: int) -> None:
    """With a true change at the limit, at most alpha of the intervals lie beyond it, for session effects of 0 to 3 %."""
    assert alarms(sessions(1, count + 1, between=between), by_data, 0.0) <= most(RUNS, ALPHA)


def test_one_process_against_sessions_of_three_keeps_alpha() -> None:
    """A single new process keeps alpha even where processes differ by more than sessions do."""
    seeds = range(11, 15)
    draws = (run for seed in seeds for run in sessions(seed, 6, between=0.007, within=0.01))
    single = ([*old, new[:1]] for *old, new in draws)
    assert alarms(single, by_data, 0.0) <= most(len(seeds) * RUNS, ALPHA)


@pytest.mark.parametrize("noise", [{"spikes": 0.05}, {"drift": 0.003}, {"spikes": 0.1, "drift": 0.001}], ids=str)
def test_spikes_and_drift_alarm_no_more_than_stated(noise: dict[str, float]) -> None:
    """A process in twenty 5 % slower, or a drift of 0.3 % per session, stays within alpha at the default tolerance."""
    draws = sessions(2, 6, between=0.003, **noise)
    assert alarms(draws, by_data, BUSY_RATIOS["train"]) <= most(RUNS, ALPHA)


@pytest.mark.parametrize("family", list(SPREADS))
@pytest.mark.parametrize("count", [1, 4])
def test_the_assumed_spread_keeps_alpha_where_it_holds(family: Family, count: int) -> None:
    """With fewer than five sessions, a machine that spreads as assumed alarms in at most alpha of the runs."""
    spread = SPREADS[family]
    draws = sessions(3, count + 1, between=spread.between)
    assert alarms(draws, lambda new, old: busy_interval(new, old, spread, ALPHA), 0.0) <= most(RUNS, ALPHA)


def test_the_canary_removes_drift_and_keeps_alpha() -> None:
    """Wall time relative to a canary that drifts alike keeps alpha with an interval less than half as wide."""
    random = np.random.default_rng(4)
    moved = random.normal(0, 0.02, (RUNS, 6, 1))
    wall = np.exp(moved + random.normal(0, 0.005, (RUNS, 6, PROCESSES))).tolist()
    canary = np.exp(moved + random.normal(0, 0.001, (RUNS, 6, 1))).tolist()
    relative = [
        history_interval(new, old, ALPHA, canary=now, canaries=then)
        for (*old, new), (*then, now) in zip(wall, canary, strict=True)
    ]
    plain = [history_interval(new, old, ALPHA) for *old, new in wall]
    assert sum(interval.low > 0 for interval in relative) <= most(RUNS, ALPHA)
    assert sum(interval.low > 0 for interval in plain) <= most(RUNS, ALPHA)
    widths = [np.median([interval.high - interval.low for interval in side]) for side in (relative, plain)]
    assert widths[0] < widths[1] / 2


def pairs(seed: int, count: int, change: float, *, drift: float = 0.0) -> Iterator[tuple[list[float], list[float]]]:
    """Pairs of processes in ABBA order, in sessions that differ by 3 %; each process is slower than the last by `drift`."""
    random = np.random.default_rng(seed)
    logs = random.normal(0, 0.03, (RUNS, 1, 1)) + random.normal(0, WITHIN, (RUNS, count, 2))
    order = np.arange(2 * count).reshape(count, 2)
    order[1::2] = order[1::2, ::-1]
    logs += drift * order
    logs[:, :, 1] += np.log1p(change)
    yield from np.exp(logs).transpose(0, 2, 1).tolist()


@pytest.mark.parametrize(("count", "drift"), [(3, 0.0), (4, 0.0), (4, 0.0005)])
def test_an_ab_keeps_alpha_whatever_its_session(count: int, drift: float) -> None:
    """Sessions that differ by 3 % and a steady drift cancel in ABBA pairs: at most alpha of the intervals exclude zero."""
    intervals = [paired_interval(base, head, ALPHA) for base, head in pairs(5, count, 0.0, drift=drift)]
    assert sum(interval.low > 0 for interval in intervals) <= most(RUNS, ALPHA)


def test_an_ab_with_the_known_spread_of_processes_keeps_alpha() -> None:
    """Knowing how processes spread narrows the interval of three pairs and keeps alpha."""
    intervals = [paired_interval(base, head, ALPHA, spread=SPREADS["train"]) for base, head in pairs(12, 3, 0.0)]
    assert sum(interval.low > 0 for interval in intervals) <= most(RUNS, ALPHA)


@pytest.mark.nightly
@pytest.mark.parametrize("alpha", [0.05, 0.005])
def test_checking_after_each_pair_keeps_alpha(alpha: float) -> None:
    """With a true change at the tolerance, all checks together regress at most alpha and pass at most 5 %."""
    rule = Sequential(alpha, PAIRED_RATIO)
    verdicts = [decided(rule, base, head) for base, head in pairs(6, rule.most_pairs, PAIRED_RATIO)]
    assert verdicts.count(Verdict.REGRESSED) <= most(RUNS, alpha)
    assert verdicts.count(Verdict.PASS) <= most(RUNS, 0.05)


def decided(rule: Sequential, base: list[float], head: list[float]) -> Verdict:
    """The verdict of the first check that has one."""
    checks = (rule.check(base[:count], head[:count]).verdict for count in range(rule.least_pairs, rule.most_pairs + 1))
    return next(verdict for verdict in checks if verdict is not None)


def test_an_ab_of_three_pairs_detects_one_and_a_half_percent() -> None:
    """At the suite's alpha and the known spread, +1.5 % regresses at once in 95 of 100 runs, and no change passes."""
    rule = Sequential(share(28), PAIRED_RATIO, spread=SPREADS["train"])
    worse = [rule.check(*pair).verdict for pair in pairs(7, 3, 0.015)]
    same = [decided(rule, *pair) for pair in pairs(7, rule.most_pairs, 0.0)]
    assert RUNS - worse.count(Verdict.REGRESSED) <= most(RUNS, 0.03)
    assert RUNS - same.count(Verdict.PASS) <= most(RUNS, 0.03)
    assert Verdict.REGRESSED not in same


@pytest.mark.parametrize(("family", "between"), [("train", 0.0015), ("prefill", 0.004), ("decode", 0.008)])
def test_a_clean_run_against_one_stored_session_passes(family: Family, between: float) -> None:
    """Where sessions differ as two H100 starts did at most, 95 of 100 clean runs pass at the default tolerance."""
    verdicts = [
        three_way(busy_interval(new, old, SPREADS[family], share(28)), BUSY_RATIOS[family], "lower")
        for *old, new in sessions(8, 2, between=between)
    ]
    assert RUNS - verdicts.count(Verdict.PASS) <= most(RUNS, 0.03)
    assert Verdict.REGRESSED not in verdicts


def test_a_suite_keeps_its_alpha_though_its_tests_share_a_start() -> None:
    """Twenty tests share the effect of one start, and a run with any alarm stays as rare as stated."""
    random = np.random.default_rng(9)
    runs, tests, alpha = 150, 20, 0.05
    spread = SPREADS["train"]
    common = random.normal(0, spread.between, (runs, 1, 2, 1))
    draws = np.exp(common + random.normal(0, spread.within, (runs, tests, 2, PROCESSES))).tolist()
    alpha_each = share(tests, alpha)
    alarmed = sum(any(busy_interval(new, [old], spread, alpha_each).low > 0 for old, new in run) for run in draws)
    assert alarmed <= most(runs, alpha)
    assert share(tests) * tests == pytest.approx(SUITE_ALPHA)


def test_a_test_that_ignores_sessions_exceeds_its_alpha() -> None:
    """On the same noise, a significance test of one session against one alarms far more often than its 5 %."""
    random = np.random.default_rng(10)
    logs = random.normal(0, 0.01, (200, 2, 1)) + random.normal(0, WITHIN, (200, 2, 8))
    rule = OTHER_RULES["Mann-Whitney p<0.05"]
    # One-sided: half of the stated level belongs to slower.
    assert sum(rule(old, new) for old, new in np.exp(logs).tolist()) > most(200, 0.05)


def test_wall_time_needs_five_sessions() -> None:
    """Fewer than five sessions leave an interval without bounds, which decides nothing and says how many there are."""
    few, enough = (history_interval([1.5], [[1.0]] * count, 0.01) for count in (4, 5))
    assert three_way(few, 0.05, "lower") is Verdict.INCONCLUSIVE
    assert few.text == "4 of the 5 stored sessions that wall time needs"
    assert three_way(enough, 0.05, "lower") is Verdict.REGRESSED
