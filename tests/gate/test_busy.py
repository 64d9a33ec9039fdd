"""GPU-busy time against accepted sessions: each verdict by example, the required sample size, and what is not compared."""

from __future__ import annotations

import math
import random
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hpc_core.case.limits import Limits
from hpc_core.gate.busy import Clock, clock_of_session
from hpc_core.gate.intervals import (
    _MEDIAN_VARIANCE,
    EARLY_PASS_ALPHA,
    PASS_ALPHA,
    SPREADS,
    Distance,
    interval_of,
    required_sample_size,
    stored_distance,
    three_way,
)
from hpc_core.gate.judge import judge
from hpc_core.gate.verdict import SUITE_ALPHA, MetricVerdict, Verdict, expected_line
from hpc_core.record.gpu_state import clock_of_readings
from hpc_core.record.metrics import Family
from hpc_core.record.record import Metric
from tests.gate.judging import stored
from tests.strategies import a_record, around, busy, counted

STEADY = [
    (0.1999, 0.2, 0.2001),
    (0.2001, 0.2002, 0.2003),
    (0.1997, 0.1998, 0.1999),
    (0.2, 0.2, 0.2001),
    (0.1999, 0.2, 0.2),
]
ROUGH = [(0.19,), (0.21,), (0.2,), (0.205,), (0.195,)]


def judged(
    *processes: float, sessions: Any = None, name: str = "busy_s", alpha: float | None = None, **changes: Any
) -> MetricVerdict:
    """Return the verdict on these processes against an accepted busy time of 0.2 s."""
    middle = sorted(processes)[len(processes) // 2]
    record = a_record({name: busy(middle, samples=processes)}, **changes)
    by_metric = sessions if sessions is None or isinstance(sessions, dict) else {name: sessions}
    lookup = stored({name: busy(0.2)})
    (row,) = judge(record, lookup, Limits(), sessions=by_metric, alpha=alpha).metrics
    return row


@pytest.mark.parametrize(
    ("processes", "sessions", "verdict", "reason"),
    [
        ((0.2, 0.2002, 0.2001), STEADY, "PASS", "by 3 processes against 5 sessions"),
        ((0.2, 0.2002, 0.2001), None, "PASS", "by 3 processes against 1 session, between sessions 0.3 % assumed"),
        ((0.206, 0.2061, 0.2062), STEADY, "REGRESSED", "limit +2 %: +2.75 % to +3.35 %"),
        ((0.194, 0.1941, 0.1942), STEADY, "IMPROVED", "limit +2 %: -3.23 % to -2.67 %"),
        ((0.206, 0.2061, 0.2062), ROUGH, "INCONCLUSIVE", "it lies on both sides of the limit"),
        ((0.2, 0.21, 0.22), STEADY[:1], "INCONCLUSIVE", "it lies on both sides of the limit"),
        ((0.2, 0.2, -0.1), STEADY, "INVALID", "holds a busy_s that is not above 0"),
        ((0.2, 0.2, 0.2), [*STEADY, (0.0,)], "INVALID", "holds a busy_s that is not above 0"),
    ],
)
def test_against_sessions(processes: tuple[float, ...], sessions: Any, verdict: str, reason: str) -> None:
    """The interval decides, and the reason gives it and its samples; sessions that differ widely decide nothing."""
    row = judged(*processes, sessions=sessions)
    assert row.verdict.value == verdict
    assert reason in row.reason
    assert (row.interval is None) == (row.alpha is None) == (verdict == "INVALID")


def test_the_required_sample_size_decides() -> None:
    """The stated number of further processes or sessions decides if they are like the others; one fewer does not."""
    spread = SPREADS["train"]
    for new, old, expected in (
        ((0.2052,), [(0.2, 0.2, 0.2001)] * 5, "2 more processes"),
        ((0.207, 0.207, 0.207), [(0.2, 0.2, 0.2001)], "2 more accepted sessions, or an A/B"),
    ):
        distance = stored_distance(new, old, spread)
        text = required_sample_size(
            distance, lambda more: three_way(interval_of(more, 0.001), 0.02, "lower") is not Verdict.INCONCLUSIVE
        )
        assert expected in text
        count, kind = int(text.split()[0]), "new" if "process" in text else "sessions"
        verdicts = [
            three_way(interval_of(distance.grown(**{kind: more}), 0.001), 0.02, "lower") for more in (count - 1, count)
        ]
        assert (verdicts[0], verdicts[1] is Verdict.INCONCLUSIVE) == (Verdict.INCONCLUSIVE, False)
    row = judged(0.2039, 0.204, 0.2041)
    assert row.settled_by
    assert row.settled_by in row.next_step


@pytest.mark.parametrize(("new", "sessions"), [(1, 5), (3, 5), (1, 1), (2, 8)])
def test_the_deviation_follows_its_formula(new: int, sessions: int) -> None:
    """deviation² = between * (1 + 1/K) + within * (1/n_new + 1/n_old), where 1/n is the variance of a median: 1, 1/2, 0.449."""
    between, within, of_median = 0.02**2, 0.01**2, {1: 1.0, 2: 0.5, 3: 0.44867}
    distance = Distance(
        centre=0.0,
        session_variance=between + within * of_median[3],
        process_variance=within,
        new=new,
        sessions=sessions,
        stored=of_median[3],
        text="",
    )
    expected = between * (1 + 1 / sessions) + within * (of_median[new] + of_median[3] / sessions)
    assert distance.deviation**2 == pytest.approx(expected)


def test_a_case_divides_its_share_over_its_busy_metrics() -> None:
    """Each of two busy metrics gets half of the case's alpha, exact ones none, and a run's last line adds them up."""
    metrics = {"busy_prefill_s": busy(), "busy_decode_token_s": busy(0.01), "kernels": counted()}
    rows = judge(a_record(metrics), stored(metrics), alpha=0.004).metrics
    assert {row.metric: row.alpha for row in rows} == {
        "busy_prefill_s": 0.002, "busy_decode_token_s": 0.002, "kernels": None,
    }  # fmt: skip
    line = expected_line(rows)
    assert line is not None
    assert line.startswith("expected false alarms in this run: 0.004 (2 tests of time and energy")
    assert expected_line(row for row in rows if row.alpha is None) is None
    assert judged(0.2).alpha == SUITE_ALPHA


def test_a_stricter_share_alarms_later() -> None:
    """A change that is REGRESSED alone is INCONCLUSIVE as one of a thousand tests."""
    verdicts = [judged(0.2075, 0.2075, 0.2075, alpha=alpha).verdict for alpha in (0.01, 0.00001)]
    assert verdicts == [Verdict.REGRESSED, Verdict.INCONCLUSIVE]


clocks = st.floats(1200, 1980)


def at_clock(*mhz: float, reasons: int = 4) -> dict[str, Any]:
    """Metrics of a record whose processes had these mean clocks, and its circumstances."""
    clock = clock_of_readings([(round(each), reasons) for each in mhz], possible_mhz=1980)
    metric = Metric(
        value=sorted(mhz)[len(mhz) // 2], samples=mhz, unit="MHz", noise="busy", better="same", depends_on=("case",), gated=False
    )  # fmt: skip
    gpu = {"busy": {"clock": msgspec.to_builtins(clock)}}
    return {"metrics": {"sm_clock_mhz": metric}, "circumstances": around(gpu=gpu)}


def judged_at(
    slower: float, mhz: float, was_mhz: float | None, *, name: str = "busy_s", alpha: float | None = None
) -> MetricVerdict:
    """Return the verdict on a time that is `slower` than accepted, at these clocks; None for sessions without one."""
    clock = at_clock(mhz, mhz, mhz, reasons=4 if mhz < 1980 else 0)
    metrics = {name: busy(0.2 * slower, samples=(0.2 * slower,) * 3)} | clock["metrics"]
    sessions: dict[str, Any] = {name: STEADY}
    if was_mhz is not None:
        sessions["sm_clock_mhz"] = [[was_mhz]] * len(STEADY)
    record = a_record(metrics, circumstances=clock["circumstances"])
    (row,) = judge(record, stored({name: busy(0.2)}), Limits(), sessions=sessions, alpha=alpha).metrics
    return row


@pytest.mark.parametrize(
    ("name", "mhz", "was_mhz", "slower", "verdict"),
    [
        ("busy_s", 1650, 1770, 1.046, "INCONCLUSIVE"),  # what the two cards showed
        ("busy_s", 1770, 1770, 1.1, "REGRESSED"),
        ("busy_s", 1650, 1770, 1.1, "REGRESSED"),  # the clock explains 7.3 % at most
        ("busy_s", 1650, None, 1.046, "INCONCLUSIVE"),  # an older session may have run at 1980 MHz
        ("busy_s", 1650, None, 1.25, "REGRESSED"),
        ("busy_s", 1980, None, 1.046, "REGRESSED"),  # nothing held this run down
        ("busy_s", 1650, None, 1.0, "PASS"),
        ("busy_s", 1770, 1650, 1650 / 1770, "PASS"),  # faster by the clock is no gain of the code
        ("busy_s", 1770, 1650, 0.85, "IMPROVED"),
        ("busy_s", 1770, 1650, 1.0, "INCONCLUSIVE"),  # the higher clock may hide 7.3 %
        ("busy_decode_token_s", 1770, 1650, 1.0, "PASS"),  # decoding follows the memory's clock
        ("busy_decode_token_s", 1700, 1980, 1980 / 1700, "INCONCLUSIVE"),
    ],
)
def test_time_at_another_clock(name: str, mhz: float, was_mhz: float | None, slower: float, verdict: str) -> None:
    """The verdict is on all that the code can have changed: from the change of the cycles to that of the seconds."""
    row = judged_at(slower, mhz, was_mhz, name=name)
    assert row.verdict.value == verdict, row.reason
    assert ("A/B on one card" in row.settled_by) == (verdict == "INCONCLUSIVE")


def test_an_undecided_clock_names_both_and_the_command() -> None:
    """The reason has both clocks, what held them down, both intervals, and the A/B that decides."""
    row = judged_at(1.046, 1650, 1770)
    assert "clock 1,770 → 1,650 MHz under the power cap" in row.reason
    assert ": +4.3 % to +4.9 % by 3 processes against 5 sessions; clock" in row.reason
    assert "so the code's part is -2.77 % to +4.9 %" in row.reason
    assert "hpc-core ab REVISION --case tiny/lora" in row.next_step


@pytest.mark.parametrize("name", ["busy_s", "busy_prefill_s", "busy_decode_token_s"])
@given(clocks, clocks, st.floats(0, 1))
@example(1980, 1200, 1)
@example(1200, 1980, 1)
@example(1200, 1980, 0)
def test_a_clock_alone_is_never_a_regression(name: str, mhz: float, was_mhz: float, follows: float) -> None:
    """Unchanged code at another clock is not REGRESSED nor IMPROVED, whatever part of its time follows the clock."""
    slower = follows * was_mhz / mhz + (1 - follows)
    assert judged_at(slower, mhz, was_mhz, name=name).verdict in (Verdict.PASS, Verdict.INCONCLUSIVE)
    if mhz <= was_mhz:
        assert judged_at(slower, mhz, None, name=name).verdict is not Verdict.REGRESSED


@given(clocks, clocks, st.floats(1.1, 3))
def test_more_than_the_clock_explains_is_a_regression(mhz: float, was_mhz: float, change: float) -> None:
    """Code that is 10 % slower or more is REGRESSED at equal clocks, and at any clocks once the law leaves it beyond the limit."""
    assert judged_at(change, mhz, mhz).verdict is Verdict.REGRESSED
    assert judged_at(change * max(1.0, was_mhz / mhz), mhz, was_mhz).verdict is Verdict.REGRESSED


@given(st.floats(0.8, 1.3), clocks, clocks)
def test_equal_clocks_change_nothing(slower: float, mhz: float, was_mhz: float) -> None:
    """At equal clocks the verdict and the interval are those of the seconds; at others the interval only grows."""
    plain, equal, other = (
        judged(*[0.2 * slower] * 3, sessions=STEADY),
        judged_at(slower, mhz, mhz),
        judged_at(slower, mhz, was_mhz),
    )
    assert plain.interval is not None
    assert other.interval is not None
    assert equal.verdict is plain.verdict
    assert equal.interval == pytest.approx(plain.interval)
    assert other.interval[0] <= plain.interval[0] + 1e-9
    assert plain.interval[1] <= other.interval[1] + 1e-9


def test_a_throttled_record_without_a_clock_is_not_regressed() -> None:
    """Records of before the clock was sampled flag the power cap by one reading: what it did to the time is not known."""
    throttled = around(notes=("GPU throttled: power cap at 1650 MHz",))
    row = judged(0.22, 0.22, 0.22, sessions=STEADY, circumstances=throttled)
    assert row.verdict is Verdict.INCONCLUSIVE
    assert "a clock of unknown height (throttled: power cap at 1650 MHz)" in row.settled_by
    assert judged(0.2, 0.2, 0.2, sessions=STEADY, circumstances=throttled).verdict is Verdict.PASS


def test_where_the_clock_is_read() -> None:
    """The clock is the metric's; what lowered it, and the card's highest, are those of any process."""
    parts = at_clock(1600, 1700, 1650)
    record = a_record(parts["metrics"], circumstances=parts["circumstances"])
    assert clock_of_session(record) == Clock(mhz=1650, possible_mhz=1980, lowered_by=("power cap",))
    strange = a_record({"busy_s": busy()}, circumstances=around(gpu={"busy": {"clock": {"mean_mhz": "x"}}}))
    assert clock_of_session(strange) == Clock()


@pytest.mark.parametrize(
    ("share", "slower", "verdict"),
    [(0.4, 1.0, "PASS"), (0.2, 1.0, "INCONCLUSIVE"), (0.99, 1.0, "INCONCLUSIVE"), (0.99, 2.5, "REGRESSED")],
)
def test_another_share_of_wall_time(share: float, slower: float, verdict: str) -> None:
    """Busy time is not compared where its shares of wall time differ more than twice, unless it caused that itself."""
    shown = Metric(value=share, unit="ratio", noise="wall", better="higher", depends_on=("case",), gated=False)
    metrics = {"busy_s": busy(0.2 * slower), "busy_share": shown}
    sessions: dict[str, Any] = {"busy_s": STEADY, "busy_share": [(0.45,), (0.41,)]}
    judgement = judge(a_record(metrics), stored({"busy_s": busy(0.2)}), sessions=sessions)
    assert judgement.verdict.value == verdict
    assert ("more than 2 times apart" in judgement.reason) == (verdict == "INCONCLUSIVE")


def test_the_variance_of_a_median_of_few_values() -> None:
    """The tabulated variances are those of medians of normal values, drawn 40,000 times."""
    random = np.random.default_rng(0)
    for count, variance in enumerate(_MEDIAN_VARIANCE, start=1):
        drawn = np.median(random.normal(size=(40_000, count)), axis=1).var()
        assert drawn == pytest.approx(variance, rel=0.05)


@pytest.mark.parametrize("family", ["train", "decode"])
@pytest.mark.parametrize("sessions", [1, 6])
def test_two_looks_pass_a_change_at_the_limit_no_more_often_than_one(family: Family, sessions: int) -> None:
    """A change as large as the tolerance passes at the first process or at all three in at most `PASS_ALPHA` of the runs."""
    spread, tolerance, runs = SPREADS[family], 0.02 if family == "train" else 0.03, 3000
    draw = random.Random(sessions)

    def session(change: float = 0.0) -> list[float]:
        start = draw.gauss(math.log1p(change), spread.between)
        return [math.exp(draw.gauss(start, spread.within)) for _ in range(3)]

    def passes(new: list[float], stored: list[list[float]], pass_alpha: float) -> bool:
        interval = interval_of(stored_distance(new, stored, spread), 0.0005, pass_alpha=pass_alpha)
        return three_way(interval, tolerance, "lower") is Verdict.PASS

    missed = 0
    for _ in range(runs):
        stored, new = [session() for _ in range(sessions)], session(tolerance)
        missed += passes(new[:1], stored, EARLY_PASS_ALPHA) or passes(new, stored, PASS_ALPHA)
    assert missed <= PASS_ALPHA * runs + 3 * math.sqrt(PASS_ALPHA * runs)
