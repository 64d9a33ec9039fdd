"""Wall time against accepted sessions: in canaries where the host sets the pace, gross changes where there is one session."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_core.case.limits import Limits
from hpc_core.gate.judge import judge
from hpc_core.gate.verdict import Judgement, MetricVerdict, Verdict
from hpc_core.record.metrics import WAITED
from hpc_core.record.record import Metric, Process
from tests.gate.judging import stored
from tests.strategies import CPU, a_record, around, counted, wall

NAME, CANARIES = "step_s", "step_per_canary"
_CANARY_S = 0.002


def a_step(seconds: float, **changes: Any) -> Metric:
    return wall(seconds, samples=(seconds,), gated=True, **changes)


def case_of(
    seconds: Sequence[float],
    canaries_s: Sequence[float],
    sessions: Sequence[Sequence[float]] = ((0.1,),),
    limits: Limits | None = None,
    share: float | None = None,
    launched: str = "warm",
) -> Judgement:
    """Return the judgement of processes that take these seconds beside these canaries; sessions took theirs beside 2 ms."""
    ratios = [step / canary for step, canary in zip(seconds, canaries_s, strict=True)]
    processes = tuple(
        Process(started_at="2026-12-01T00:00:00+00:00", seconds=1.0, wall_s={NAME: step, CANARIES: ratio})
        for step, ratio in zip(seconds, ratios, strict=True)
    )
    metrics = {NAME: a_step(seconds[0]), CANARIES: wall(ratios[0], unit="1", samples=(ratios[0],))}
    record = a_record(metrics, circumstances=around(CPU, launched=launched), processes=processes)
    known: dict[str, Any] = {
        NAME: [list(session) for session in sessions],
        CANARIES: [[step / _CANARY_S for step in session] for session in sessions],
    }
    if share is not None:
        known["busy_share"] = [[share] for _ in sessions]
    lookup = stored({NAME: a_step(sessions[0][0])}, machine=CPU)
    return judge(record, lookup, limits or Limits(), sessions=known)


def judged(*arguments: Any, **options: Any) -> MetricVerdict:
    (row,) = (row for row in case_of(*arguments, **options).metrics if row.metric == NAME)
    return row


STEADY = tuple((0.1 * factor,) for factor in (1.0, 1.01, 0.99, 1.005, 0.995, 1.0))


@pytest.mark.parametrize(
    ("seconds", "canaries_s", "options", "verdict", "reason"),
    [
        # One session: gross changes, by seconds and by canaries, in every process.
        ([0.19], [0.002], {}, "PASS", "so only +100 % counts"),
        ([0.21], [0.002], {}, "REGRESSED", "+110 % in units of the host canary by 1 process against 1 session"),
        ([0.21], [0.004], {}, "PASS", "+5 % in units of the host canary"),  # the host is slow, not the code
        ([0.15], [0.001], {}, "PASS", "+200 % in units of the host canary"),  # seconds do not agree
        ([0.21, 0.3, 0.22], [0.002] * 3, {}, "REGRESSED", "3 processes against 1 session"),
        # A step in the test process has passes in one process, and no more of them can be asked for.
        ([0.21, 0.3, 0.22], [0.002] * 3, {"launched": "inline"}, "REGRESSED", "by 3 passes against 1 session"),
        ([0.21, 0.3, 0.12], [0.002] * 3, {}, "PASS", "3 processes against 1 session"),  # one of them was fast
        ([0.04], [0.002], {}, "IMPROVED", "-60 %"),
        # The device sets the pace: seconds, whatever the canary does.
        ([0.21], [0.004], {"share": 0.9}, "REGRESSED", ": +110 % by 1 process"),
        # On a GPU machine the host sets it: the spread of a time in canaries is assumed.
        (
            [0.21],
            [0.004],
            {"share": 0.1},
            "PASS",
            "+5 % in units of the host canary by 1 process against 1 session, between",
        ),
        ([0.11], [0.002], {"share": 0.1}, "REGRESSED", "limit +7.3 %: +10 % in units of the host canary"),
        ([0.22], [0.004], {"share": 0.1}, "REGRESSED", "limit +7.3 %: +10 %"),
        ([0.091], [0.002], {"share": 0.1}, "IMPROVED", "-9 %"),
        # More sessions set the limit themselves.
        ([0.104], [0.002], {"sessions": STEADY}, "PASS", "limit +5 %"),
        ([0.108], [0.002], {"sessions": STEADY}, "REGRESSED", "limit +5 %: +8 %"),
        ([0.216], [0.004], {"sessions": STEADY}, "REGRESSED", "limit +5 %: +8 %"),  # twice as slow a host
        ([0.2], [0.004], {"sessions": STEADY}, "PASS", "limit +5 %: +0 %"),
        ([0.09], [0.002], {"sessions": STEADY}, "IMPROVED", "-10 %"),
        # Two sessions that differ tell no more than one.
        ([0.3], [0.001], {"sessions": ((0.1,), (0.13,))}, "REGRESSED", "limit +100 %"),
        ([0.15], [0.0005], {"sessions": ((0.1,), (0.13,))}, "PASS", "limit +100 %"),
        # A limit of the owner's.
        ([0.115], [0.002], {"limits": Limits(step_s="20%")}, "PASS", "limit +20 %: +15 %"),
        ([0.13], [0.002], {"limits": Limits(step_s="20%")}, "INCONCLUSIVE", "that may be noise"),
        ([0.13], [0.002], {"limits": Limits(step_s="20%"), "sessions": STEADY}, "REGRESSED", "limit +20 %: +30 %"),
        ([0.5], [0.002], {"limits": Limits(step_s="20%")}, "REGRESSED", "limit +20 %: +400 %"),
        ([0.25], [0.002], {"limits": Limits(step_s="300%")}, "PASS", "limit +300 %"),
        ([0.115], [0.002], {"limits": Limits(step_s=0.11)}, "REGRESSED", "allowed is at most 110.00 ms"),
        ([0.0], [0.002], {}, "INVALID", "zero proves nothing"),
    ],
)
def test_wall_time(seconds: Any, canaries_s: Any, options: Any, verdict: str, reason: str) -> None:
    """Each verdict by example."""
    row = judged(seconds, canaries_s, **options)
    assert row.verdict.value == verdict, row.reason
    assert reason in row.reason
    assert bool(row.settled_by) == (verdict == "INCONCLUSIVE")


@given(st.floats(0.5, 20.0), st.lists(st.floats(0.5, 2.0), min_size=1, max_size=7))
def test_a_slower_host_alone_is_never_a_regression(slowdown: float, sessions: list[float]) -> None:
    """A host that stretches step and canary alike changes no verdict, however many sessions there are."""
    known = [(0.1 * factor,) for factor in sessions]
    clean = math.exp(sum(map(math.log, sessions)) / len(sessions))
    row = judged([0.1 * clean * slowdown], [_CANARY_S * slowdown], sessions=known)
    assert row.verdict is Verdict.PASS, row.reason


@pytest.mark.parametrize("spread", [0.02, 0.1])
@pytest.mark.parametrize("count", [2, 5, 8])
def test_clean_runs_are_seldom_regressed(spread: float, count: int) -> None:
    """Sessions that differ by chance: at most 2 of 100 clean runs are REGRESSED at the level of 0.01, and none is undecided."""
    draw, verdicts = random.Random(count), []
    for _ in range(400):
        drawn = [0.1 * math.exp(draw.gauss(0, spread)) for _ in range(count + 1)]
        verdicts.append(judged([drawn[0]], [_CANARY_S], sessions=[(each,) for each in drawn[1:]]).verdict)
    assert verdicts.count(Verdict.REGRESSED) <= 8
    assert set(verdicts) <= {Verdict.PASS, Verdict.REGRESSED, Verdict.IMPROVED}


def test_a_time_that_was_disturbed_is_named_and_not_judged() -> None:
    """Where every call waited for a core, the case keeps its verdict, and a remark names the time; with a limit it is undecided."""
    note = f"10 of 10 {WAITED}"
    metrics = {NAME: wall(0.5, note=note), "operators": counted(9)}
    lookup = stored({NAME: a_step(0.1), "operators": counted(9)}, machine=CPU)
    judgement = judge(a_record(metrics, circumstances=around(CPU)), lookup)
    assert judgement.verdict is Verdict.PASS
    assert judgement.remarks == (f"step_s is 500.00 ms, not judged: {note}.",)
    limited = judge(a_record(metrics, circumstances=around(CPU)), lookup, Limits(step_s="20%"))
    assert limited.verdict is Verdict.INCONCLUSIVE
    ungated = judge(a_record({**metrics, NAME: wall(0.5)}, circumstances=around(CPU)), lookup)
    assert ungated.verdict is Verdict.INCOMPATIBLE


@pytest.mark.parametrize(
    ("seconds", "canaries_s", "options", "remark"),
    [
        ([0.3, 0.12, 0.11], [0.002] * 3, {}, "+200 % as shown is beyond the limit +100 %, and passes: +20 % in units of the host canary by 3 processes against 1 session."),
        ([0.5, 0.3, 0.12], [0.002] * 3, {}, "+400 % as shown is beyond the limit +100 %, and passes: +200 % in units of the host canary by 3 processes against 1 session, not in every process."),
        ([0.2], [0.004], {"sessions": STEADY}, "+100 % as shown is beyond the limit +5 %, and passes: +0 % in units of the host canary by 1 process against 6 sessions."),
        ([0.12], [0.002], {}, ""),
    ],
)  # fmt: skip
def test_a_number_that_passes_and_looks_worse_has_a_remark(
    seconds: Any, canaries_s: Any, options: Any, remark: str
) -> None:
    """The number in the table is that of the first process: where it alone is far out, a sentence says what was judged."""
    row = judged(seconds, canaries_s, **options)
    assert row.verdict is Verdict.PASS
    assert row.remark == (f"{NAME} {remark}" if remark else "")


def test_a_time_without_an_accepted_canary_is_new() -> None:
    """Where only the accepted seconds are known, a slow host would be a regression: the time is not judged, and the row says why."""
    record = a_record({NAME: a_step(0.9), CANARIES: wall(9.0, unit="1")}, circumstances=around(CPU))
    judgement = judge(record, stored({NAME: a_step(0.1)}, machine=CPU))
    (row,) = judgement.metrics
    assert (row.judged, row.verdict) == (False, Verdict.NO_BASELINE)
    assert "no accepted session holds its canary" in row.reason
