"""Energy against accepted sessions: it is worse only beyond what they move by themselves, and by 2x where there is only one."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_core.baselines.baseline import gated_metrics
from hpc_core.case.limits import Limits
from hpc_core.gate.busy import sessions_of_regime
from hpc_core.gate.judge import judge
from hpc_core.gate.verdict import Judgement, MetricVerdict, Verdict
from hpc_core.record.metrics import metric
from hpc_core.record.record import Metric
from tests.gate.judging import stored
from tests.strategies import a_record, busy

NAME = "energy_step_j"
STEADY = [[50.0], [50.5], [49.5], [50.2], [49.8], [50.1]]
GOODNESS = [Verdict.IMPROVED, Verdict.PASS, Verdict.INCONCLUSIVE, Verdict.REGRESSED]


def energy(joules: float) -> Metric:
    return metric(NAME, joules, on_gpu=True)


def case_of(joules: float, sessions: Any = None, limits: Limits | None = None) -> Judgement:
    """Return the judgement of a step that takes these joules; 50 are accepted."""
    by_metric = None if sessions is None else {NAME: sessions}
    return judge(a_record({NAME: energy(joules)}), stored({NAME: energy(50)}), limits or Limits(), sessions=by_metric)


def judged(joules: float, sessions: Any = None, limits: Limits | None = None) -> MetricVerdict:
    (row,) = case_of(joules, sessions, limits).metrics
    return row


@pytest.mark.parametrize(
    ("joules", "sessions", "limit", "verdict", "reason"),
    [
        (80, None, None, "PASS", "limit +64.3 %: +60 % by 1 process against 1 session, between sessions 10 % assumed"),
        (90, None, None, "REGRESSED", "limit +64.3 %: +80 %"),
        (24, None, None, "IMPROVED", "limit +64.3 %: -52 %"),
        (54, STEADY, None, "PASS", "limit +11.5 %: +8 % by 1 process against 6 sessions; +19 % would be seen"),
        (70, STEADY, None, "REGRESSED", "limit +11.5 %: +40 %"),
        (30, STEADY, None, "IMPROVED", "against 6 sessions"),
        (70, [[50.0], [70.0]], None, "PASS", "between sessions 10 % assumed; +100 % would be seen in 95 % of runs"),
        (101, [[50.0], [50.0]], None, "REGRESSED", "limit +"),
        (54, STEADY, "10%", "PASS", "limit +10 %: "),
        (56, STEADY, "10%", "INCONCLUSIVE", "that may be noise"),
        (56, None, "10%", "INCONCLUSIVE", "that may be noise"),
        (110, None, "10%", "REGRESSED", "limit +10 %: +120 %"),
        (110, None, "150%", "PASS", "limit +150 %: +120 %"),
        (50, STEADY, "25%", "PASS", "limit +25 %: "),
        (90, STEADY, "25%", "REGRESSED", "limit +25 %: "),
        (55, STEADY, 54.0, "REGRESSED", "allowed is at most 54 J"),
        (55, STEADY, 60.0, "PASS", ""),
        (50, [*STEADY, [0.0]], None, "INVALID", "energy_step_j of this or an accepted session is not above 0"),
    ],
)
def test_energy(joules: float, sessions: Any, limit: Any, verdict: str, reason: str) -> None:
    """Each verdict by example; a percentage is decided three ways, a budget at once."""
    row = judged(joules, sessions, Limits(energy_step_j=limit))
    assert row.verdict.value == verdict, row.reason
    assert reason in row.reason
    assert bool(row.settled_by) == (verdict == "INCONCLUSIVE")


@given(st.floats(20, 200), st.floats(20, 200), st.lists(st.floats(40, 60), max_size=8))
def test_more_energy_is_never_judged_better(one: float, other: float, sessions: list[float]) -> None:
    """A higher number never gets a better verdict, whatever the sessions."""
    rows = [judged(joules, [[each] for each in sessions] or None) for joules in sorted((one, other))]
    assert GOODNESS.index(rows[0].verdict) <= GOODNESS.index(rows[1].verdict)


@pytest.mark.parametrize("spread", [0.03, 0.1])
@pytest.mark.parametrize("count", [2, 5, 8])
def test_unchanged_energy_is_not_a_false_alarm(spread: float, count: int) -> None:
    """Sessions of the stated spread: at most 1 in 100 clean runs is REGRESSED, and none is INCONCLUSIVE."""
    draw, verdicts = random.Random(count), []
    for _ in range(600):
        drawn = [[50 * math.exp(draw.gauss(0, spread))] for _ in range(count + 1)]
        verdicts.append(judged(drawn[0][0], drawn[1:]).verdict)
    assert verdicts.count(Verdict.REGRESSED) <= 6
    assert Verdict.INCONCLUSIVE not in verdicts


def test_the_limit_that_sessions_set_is_the_one_that_counts() -> None:
    """What lies beyond the limit of the row is REGRESSED, and a little less is not; sessions that differ widely set a wide one."""
    rough = [[50.0], [55.0], [46.0], [52.0], [48.0], [51.0]]
    row = judged(50, rough)
    limit = float(row.limit.removeprefix("+").removesuffix(" %")) / 100
    assert 0.2 < limit < 1
    centre = math.exp(sum(math.log(each) for (each,) in rough) / len(rough))
    assert judged(centre * (1 + limit) * 1.002, rough).verdict is Verdict.REGRESSED
    assert judged(centre * (1 + limit) * 0.99, rough).verdict is Verdict.PASS


def test_energy_that_was_not_measured_leaves_the_case_its_verdict() -> None:
    """Somebody else on the GPU leaves a run without energy: a remark names it, and the other metrics are judged."""
    metrics = {"busy_s": busy(0.2)}
    judgement = judge(a_record(metrics), stored({**metrics, NAME: energy(50)}))
    assert judgement.verdict is Verdict.PASS
    assert judgement.remarks == ("not measured, not judged: energy_step_j.",)
    limited = judge(a_record(metrics), stored({**metrics, NAME: energy(50)}), Limits(energy_step_j="10%"))
    assert limited.verdict is Verdict.INCOMPATIBLE


def test_energy_ends_no_regime() -> None:
    """Sessions whose energy differs stay in the regime: it moves with the host, and busy time needs them."""
    accepted = gated_metrics(a_record({"busy_s": busy(0.2), NAME: energy(50)}))
    assert set(accepted) == {"busy_s", NAME}
    sessions = [{"busy_s": [0.2], NAME: [80.0]}, {"busy_s": [0.2], NAME: [50.0]}]
    assert sessions_of_regime(sessions, accepted) == {"busy_s": [[0.2], [0.2]], NAME: [[80.0], [50.0]]}
