"""What a pull request loosens is named, and limits of the merge base hold beside its own."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_core.baselines.baseline import Missing
from hpc_core.case.limits import GiB, Limits
from hpc_core.gate.judge import judge
from hpc_core.gate.loosened import loosened_limits, loosened_waivers
from hpc_core.gate.pull_request import Side, judge_pull_request, limits_beside
from hpc_core.gate.verdict import Verdict
from hpc_core.gate.waivers import Waiver, waived, waived_since_base
from tests.gate.judging import baseline, stored
from tests.strategies import a_case, a_record, counted, limits, peak

TODAY = datetime.date(2026, 12, 1)
ACCEPTED = {"peak_bytes": peak(GiB), "operators": counted(1000)}


def lines(old: Limits, new: Limits) -> list[str]:
    """Return what changed limits loosen, without the case."""
    return [each.line.replace(" of tiny/lora", "") for each in loosened_limits("tiny/lora", old, new, ACCEPTED)]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ({}, {"peak_bytes": "900%"}, ["limit on peak_bytes: +2.00 MiB → +900 %"]),
        ({"peak_bytes": "1%"}, {}, []),  # the registry's tolerance is less
        ({"peak_bytes": "0.01%"}, {}, ["limit on peak_bytes: +0.01 % → +2.00 MiB"]),
        ({"peak_bytes": "5%"}, {"peak_bytes": "1%"}, []),
        ({}, {"peak_bytes": 2 * GiB}, []),  # an absolute limit is checked beside the tolerance
        ({"peak_bytes": 2 * GiB}, {}, ["absolute limit on peak_bytes: 2.00 GiB → none"]),
        ({"peak_bytes": 2 * GiB}, {"peak_bytes": 3 * GiB}, ["absolute limit on peak_bytes: 2.00 GiB → 3.00 GiB"]),
        ({"peak_bytes": 3 * GiB}, {"peak_bytes": 2 * GiB}, []),
        (
            {"peak_bytes": 2 * GiB},
            {"peak_bytes": "50%"},
            ["limit on peak_bytes: +2.00 MiB → +50 %", "absolute limit on peak_bytes: 2.00 GiB → none"],
        ),
        ({"kernels": "1%"}, {"kernels": "90%"}, []),  # the baseline has no such metric, so it is judged by nothing
    ],
)
def test_limits_that_allow_more_are_named(old: dict[str, Any], new: dict[str, Any], expected: list[str]) -> None:
    """With the value at the merge base, in the metric's unit."""
    assert lines(Limits(**old), Limits(**new)) == expected


@given(limits, limits, st.integers(1, 3 * GiB), st.integers(1, 3000))
def test_limits_of_the_merge_base_hold_beside_those_of_the_code(
    old: Limits, new: Limits, size: int, count: int
) -> None:
    """The verdict is never better than by either alone; and where nothing is named, the merge base's limits change nothing."""
    record = a_record({"peak_bytes": peak(size), "operators": counted(count)})
    both = judge(record, stored(ACCEPTED), new, beside=[old]).verdict
    ours, theirs = (judge(record, stored(ACCEPTED), each).verdict for each in (new, old))
    assert both.severity >= max(ours.severity, theirs.severity) or Verdict.IMPROVED in (ours, theirs)
    assert (both.outcome() == "failed") >= ("failed" in (ours.outcome(), theirs.outcome()))
    same_metrics = set(old.named()) <= {"peak_bytes", "operators"}
    if same_metrics and not lines(old, new) and both is not Verdict.IMPROVED:
        assert both.outcome() == ours.outcome()


def test_an_acceptance_brings_an_absolute_limit_and_no_percentage() -> None:
    """What is accepted must be what was measured, so the merge base's percentage holds against the new baseline, too."""
    old = baseline(a_record(case=a_case(limits=Limits(peak_bytes=2 * GiB, operators="1%", kernels="1%"))))
    new = baseline(a_record(case=a_case(limits=Limits(peak_bytes=4 * GiB, operators="90%"))))
    at_base, at_head = limits_beside(old, new)
    assert at_base == (old.spec.limits,)
    assert at_head == (Limits(operators="1%"), new.spec.limits)
    assert limits_beside(Missing(path="x"), new) == ((), ())
    assert limits_beside(old, Missing(path="x")) == ((old.spec.limits,), (old.spec.limits,))


@pytest.mark.parametrize(
    ("peak_bytes", "accepted", "outcome"),
    [
        (4 * GiB, 3 * GiB, "passed"),  # accepted as it is, with the higher limit
        (4 * GiB, 3.5 * GiB, "failed"),  # more is accepted than was measured
        (2 * GiB, 3 * GiB, "failed"),  # the limit was not raised
        ("90%", 2.5 * GiB, "failed"),  # the percentage does not make another value the accepted one
    ],
)
def test_a_value_beyond_the_old_limit_passes_only_as_accepted(peak_bytes: Any, accepted: float, outcome: str) -> None:
    """A higher absolute limit comes with an acceptance of what was measured; nothing else lifts the one at the merge base."""
    allowed = Limits(peak_bytes=peak_bytes)
    old = baseline(a_record({"peak_bytes": peak(GiB)}, case=a_case(limits=Limits(peak_bytes=2 * GiB))))
    new = baseline(a_record({"peak_bytes": peak(int(accepted))}, case=a_case(limits=allowed)))
    record = a_record({"peak_bytes": peak(3 * GiB)}, case=a_case(limits=allowed))
    sides = zip((old, new), limits_beside(old, new), strict=True)
    found = judge_pull_request(*(Side(each, judge(record, each, beside=beside)) for each, beside in sides))
    assert found.outcome() == outcome


def waiver(**changes: Any) -> Waiver:
    fields = {"case": "tiny/*", "metric": "peak_bytes", "limit": "+5 %", "reason": "known", "owner": "jane"}
    return Waiver(**(fields | {"expires": datetime.date(2027, 1, 31)} | changes))


@pytest.mark.parametrize(
    ("changes", "is_looser"),
    [
        ({}, False),
        ({"reason": "another"}, False),
        ({"owner": "joe"}, False),
        ({"limit": "+4 %"}, False),
        ({"expires": datetime.date(2027, 1, 30)}, False),
        ({"limit": "+900 %"}, True),
        ({"limit": 8 * GiB}, True),
        ({"expires": datetime.date(9999, 12, 31)}, True),
        ({"case": "*"}, True),
        ({"metric": "operators"}, True),
    ],
)
def test_waivers_that_allow_more_are_named(changes: dict[str, Any], is_looser: bool) -> None:
    """A new one, a wider one, one that holds longer; not one that is merely reworded or tightened."""
    found = loosened_waivers([waiver()], [waiver(**changes)])
    assert bool(found) is is_looser
    assert all("until" in each.new and each.old for each in found)


def test_a_waiver_needs_the_merge_base_and_the_pull_request() -> None:
    """Brought by the pull request it excuses nothing yet; taken away by it, it excuses nothing any more."""
    record = a_record({"peak_bytes": peak(GiB + GiB // 32)})
    judgement = judge(record, stored({"peak_bytes": peak(GiB)}))
    for here, base in (([waiver()], []), ([], [waiver()])):
        found = waived_since_base(judgement, record, here, base, TODAY)
        assert found.outcome() == "failed"
        assert any("a waiver counts from the merge on" in remark for remark in found.remarks) is bool(here)
    assert waived_since_base(judgement, record, [waiver()], [waiver()], TODAY) == waived(
        judgement, record, [waiver()], TODAY
    )
