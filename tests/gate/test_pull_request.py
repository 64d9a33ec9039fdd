"""A pull request is judged by the merge base, so editing a baseline does not excuse a regression."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_core.baselines.baseline import Damaged, Lookup, Missing
from hpc_core.case.limits import GiB, Limits
from hpc_core.gate.judge import judge
from hpc_core.gate.pull_request import Side, judge_pull_request
from hpc_core.gate.verdict import Judgement, Verdict
from hpc_core.record.record import Metric, Record
from tests.gate.judging import stored
from tests.strategies import STACK, a_record, busy, counted, failed_record, peak

NONE = Missing(path="base")
values = st.integers(1, 60).map(lambda number: number * 2**28)


def of_record(record: Record, base: Lookup, head: Lookup, limits: Limits | None = None) -> Judgement:
    """Judge the record by the rules of a pull request."""
    return judge_pull_request(*(Side(lookup, judge(record, lookup, limits)) for lookup in (base, head)))


def judged(base: int | Lookup, head: int | Lookup, new: int, **more: Any) -> Judgement:
    """Judge a peak of `new` bytes against the baselines of the merge base and of the pull request."""
    old, own = (stored({"peak_bytes": peak(each)}) if isinstance(each, int) else each for each in (base, head))
    return of_record(a_record({"peak_bytes": peak(new)}), old, own, **more)


@given(values, values)
def test_an_untouched_baseline_is_judged_plainly(base: int, new: int) -> None:
    """A pull request that leaves the baseline alone is judged by it as usual."""
    assert judged(base, base, new) == judge(a_record({"peak_bytes": peak(new)}), stored({"peak_bytes": peak(base)}))


@given(values, values, values)
def test_a_test_passes_only_if_both_baselines_agree(base: int, head: int, new: int) -> None:
    """A test passes only if the record equals what the pull request accepts or is no worse than the merge base.

    The pull request's baseline must not be worse than the record. Worse than the merge base is always REGRESSED.
    """
    judgement = judged(base, head, new)
    alone = {name: judged(value, value, new).verdict for name, value in (("base", base), ("head", head))}
    if alone["base"] is Verdict.REGRESSED:
        assert judgement.verdict is Verdict.REGRESSED
        assert (judgement.outcome() == "passed") == (alone["head"] is Verdict.PASS and base != head)
    else:
        loosened = alone["head"] is Verdict.IMPROVED and head > base
        assert (judgement.outcome() == "passed") == (alone["head"] is not Verdict.REGRESSED and not loosened)
        assert (judgement.verdict is Verdict.INVALID) == loosened
    assert bool(judgement.excuses) == (alone["base"] is Verdict.REGRESSED and judgement.outcome() == "passed")


def test_the_excuse_states_what_was_accepted() -> None:
    """The excuse gives both values and the reason; a baseline that does not fit the record is named."""
    [excuse] = judged(5 * GiB, 7 * GiB, 7 * GiB).excuses
    assert excuse.text == "accepted in this pull request: peak_bytes 5.00 GiB → 7.00 GiB, reason: r"
    loose = judged(5 * GiB, 9 * GiB, 7 * GiB)
    assert loose.outcome() == "failed"
    assert "accepts peak_bytes 5.00 GiB → 9.00 GiB, but that is not what this run gives" in loose.metrics[0].reason


def test_a_baseline_raised_for_nothing_is_invalid() -> None:
    """A baseline that allows more than unchanged code needs is INVALID; tightening one is fine."""
    judgement = judged(5 * GiB, 9 * GiB, 5 * GiB)
    assert (judgement.verdict, judgement.outcome()) == (Verdict.INVALID, "failed")
    assert judgement.headline == "peak_bytes -4.00 GiB (against the baseline of this pull request)"
    assert "would hide the next regression" in judgement.reason
    assert judged(9 * GiB, 5 * GiB, 5 * GiB).verdict is Verdict.IMPROVED


def test_another_metric_is_not_excused() -> None:
    """Accepting more memory excuses memory, and no other metric of the case."""
    record = a_record({"peak_bytes": peak(7 * GiB), "operators": counted(9)})
    base = stored({"peak_bytes": peak(5 * GiB), "operators": counted(8)})
    head = stored({"peak_bytes": peak(7 * GiB), "operators": counted(8)})
    judgement = of_record(record, base, head)
    assert judgement.outcome() == "failed"
    assert [row.metric for row in judgement.metrics if "This pull request accepts" in row.reason] == []
    assert of_record(record, base, stored(record.metrics)).outcome() == "passed"


@pytest.mark.parametrize("base", [NONE, Damaged(path="x", reason="y")])
def test_what_the_merge_base_cannot_judge_is_judged_by_the_new_baseline(base: Lookup) -> None:
    """A new case is judged by its own baseline, with the remark that the merge base has none."""
    assert judged(base, GiB, GiB).verdict is Verdict.PASS
    assert judged(base, GiB, 2 * GiB).verdict is Verdict.REGRESSED
    assert "the merge base has none" in judged(base, GiB, GiB).remarks[0]
    assert judged(NONE, Missing(path="head"), GiB).verdict is Verdict.NO_BASELINE


@pytest.mark.parametrize("head", [Missing(path="head"), Damaged(path="x", reason="y")])
def test_removing_or_damaging_a_baseline_excuses_nothing(head: Lookup) -> None:
    """Without a sound baseline in the pull request, the merge base's verdict stands; a damaged one fails by itself."""
    assert judged(GiB, head, 2 * GiB).outcome() == "failed"
    assert judged(GiB, head, GiB).outcome() == ("passed" if isinstance(head, Missing) else "failed")


def test_a_limit_of_the_owner_is_not_lifted() -> None:
    """Accepting a value beyond an absolute limit leaves it REGRESSED."""
    assert judged(GiB, 2 * GiB, 2 * GiB, limits=Limits(peak_bytes=GiB)).outcome() == "failed"


def test_an_accepted_change_of_metrics_passes() -> None:
    """A metric added or dropped together with its baseline passes under strict, and dropping is remarked."""
    old: dict[str, Metric] = {"peak_bytes": peak(), "operators": counted()}
    record = a_record({"peak_bytes": peak(), "kernels": counted(5)})
    judgement = of_record(record, stored(old), stored(record.metrics))
    assert judgement.outcome(strict=True) == "passed"
    assert judgement.remarks == ("dropped by this pull request: operators",)
    assert of_record(record, stored(old), stored(old)).outcome(strict=True) == "failed"


def test_a_new_metric_is_judged_by_the_baseline_that_brings_it() -> None:
    """A metric in neither baseline is not judged; one in the pull request's baseline is judged by it."""
    old: dict[str, Metric] = {"peak_bytes": peak()}
    record = a_record({"peak_bytes": peak(), "kernels": counted(5)})
    neither = of_record(record, stored(old), stored({"peak_bytes": peak(1)}))
    assert [row.metric for row in neither.metrics if not row.judged] == ["kernels"]
    brought = of_record(record, stored(old), stored(old | {"kernels": counted(4)}))
    assert brought.outcome() == "failed"
    assert all(row.judged for row in brought.metrics)


def test_what_cannot_be_decided_is_not_excused() -> None:
    """If it is undecided whether the record is what the pull request accepts, the verdict is INCONCLUSIVE."""
    record = a_record({"busy_s": busy(0.5)})
    base, head = stored({"busy_s": busy(0.25)}), stored({"busy_s": busy(0.5)})
    head = msgspec.structs.replace(head, stack=STACK | {"driver": "590.0"})
    judgement = of_record(record, base, head)
    assert (judgement.verdict, judgement.outcome()) == (Verdict.INCONCLUSIVE, "skipped")
    assert "REGRESSED against the merge base; this pull request accepts busy_s" in judgement.metrics[0].reason


def test_a_failed_run_stays_one() -> None:
    """A run that gave no numbers is INVALID whatever the baselines hold."""
    judgement = of_record(failed_record(), NONE, stored({"peak_bytes": peak()}))
    assert judgement.broken
    assert judgement.verdict is Verdict.INVALID
