"""The comparison of two sides: what counts as a difference, in which order processes run, when it is decided, the exit code."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_core.case.case import Case
from hpc_core.case.errors import SpecError
from hpc_core.case.limits import Limits
from hpc_core.catalogue import FULL, TINY, finetune, lora, tiny
from hpc_core.cli.ab import default_budget_s
from hpc_core.compare.ab import Comparison, Plan, SideName, compare
from hpc_core.compare.differences import Difference, Rule, exact_rows
from hpc_core.gate.verdict import Verdict
from hpc_core.record.record import Metric, Record
from tests.strategies import a_case, a_record, counted, failed_record, peak

CASE = a_case("tiny/lora")
OTHER = a_case("tiny/other")
Processes = Callable[[SideName, int], Record]
"""The record of a side's n-th process."""


def step(seconds: float) -> Metric:
    return Metric(
        value=seconds, samples=(seconds,) * 3, unit="s", noise="wall", better="lower",
        depends_on=("case", "stack", "machine"), gated=False,
    )  # fmt: skip


def timed(base: Iterator[float], head: Iterator[float]) -> Processes:
    sources: dict[SideName, Iterator[float]] = {"base": base, "head": head}
    return lambda side, _: a_record({"peak_bytes": peak(), "step_s": step(next(sources[side]))})


def compared(
    processes: Processes, cases: tuple[Case, ...] = (CASE,), **plan: float | bool
) -> tuple[Comparison, list[str]]:
    """The comparison, and the sides in the order in which they ran."""
    order: list[str] = []

    def run(side: SideName, case: Case, _again: bool) -> Record:
        order.append(side)
        return processes(side, order.count(side))

    return compare(msgspec.convert({"cases": cases, **plan}, Plan), run, lambda _: None), order


def row(comparison: Comparison, metric: str) -> Difference:
    return next(row for row in comparison.results[0].rows if row.metric == metric)


def test_pairs_run_in_abba_order() -> None:
    """Pairs run base head, head base, base head …, so a drift of the machine favours neither side."""
    _, order = compared(timed(itertools.repeat(1.0), itertools.cycle((0.9, 1.3))))
    assert order == (["base", "head", "head", "base"] * 12)


def test_equal_sides_are_decided_after_three_pairs() -> None:
    """If exact metrics agree and time lies within its tolerance, three pairs are enough."""
    comparison, order = compared(timed(itertools.cycle((1.0, 1.004)), itertools.cycle((1.004, 1.0))))
    assert (len(order), row(comparison, "step_s").verdict, comparison.exit_code(strict=True)) == (6, Verdict.PASS, 0)
    assert not [one for one in comparison.results[0].rows if one.differs]


def test_a_slower_head_is_worse() -> None:
    """+20 % with little noise is REGRESSED, with an interval beyond the tolerance of 5 %."""
    comparison, _ = compared(timed(itertools.cycle((1.0, 1.01)), itertools.cycle((1.2, 1.21))))
    difference = row(comparison, "step_s")
    assert (difference.verdict, comparison.exit_code()) == (Verdict.REGRESSED, 1)
    assert difference.interval is not None
    assert 0.05 < difference.interval[0] < 0.2 < difference.interval[1]


def test_noise_is_inconclusive_and_says_what_would_decide() -> None:
    """Twenty-four pairs that disagree are INCONCLUSIVE: exit code 0, and 10 under strict."""
    comparison, order = compared(timed(itertools.repeat(1.0), itertools.cycle((0.7, 1.5))))
    difference = row(comparison, "step_s")
    assert (len(order), difference.verdict) == (48, Verdict.INCONCLUSIVE)
    assert "would decide it" in difference.reason
    assert (comparison.exit_code(), comparison.exit_code(strict=True)) == (0, 10)


def test_only_the_first_pair_is_measured_in_full() -> None:
    """Further pairs measure times only, since counts are the same in each process."""
    runs: list[tuple[SideName, bool]] = []

    def run(side: SideName, _: Case, again: bool) -> Record:
        runs.append((side, again))
        return a_record({"step_s": step(1.0)} if again else {"peak_bytes": peak(), "step_s": step(1.0)})

    (result,) = compare(Plan(cases=(CASE,)), run, lambda _: None).results
    assert runs[:4] == [("base", False), ("head", False), ("head", True), ("base", True)]
    assert all(again for _, again in runs[2:])
    assert {one.metric: (one.verdict, one.pairs) for one in result.rows} == {
        "peak_bytes": (Verdict.PASS, 1),
        "step_s": (Verdict.PASS, 3),
    }


def test_a_soaks_wall_time_is_shown_and_takes_no_further_pair() -> None:
    """A soak's wall time takes no further pair, since its pairs take minutes; its GPU-busy time is judged as usual."""
    soak = finetune(tiny, lora(), variant="soak", batch=1, length=8, steps=100)
    doubled = timed(itertools.repeat(1.0), itertools.repeat(2.0))
    comparison, order = compared(doubled, (soak,))
    assert order == ["base", "head"]
    assert (row(comparison, "step_s").verdict, row(comparison, "step_s").ratio) == (None, 1.0)
    assert row(comparison, "peak_bytes").verdict is Verdict.PASS
    busy = msgspec.structs.replace(step(1.0), noise="busy")
    _, order = compared(lambda *_: a_record({"busy_s": busy, "step_s": step(1.0)}), (soak,))
    assert len(order) == 6


def test_a_budget_that_ends_leaves_exact_metrics_decided() -> None:
    """Without time for three pairs, exact metrics are decided and times INCONCLUSIVE; a case that never began says so."""
    comparison, order = compared(timed(itertools.repeat(1.0), itertools.repeat(1.0)), budget_s=1e-9)
    assert (order, comparison.results[0].error) == ([], "unmeasured")
    plan = Plan(cases=(CASE, OTHER), budget_s=1e-3)
    slow = iter([0.002] * 4)

    def run(side: SideName, case: Case, _again: bool) -> Record:
        time.sleep(next(slow))
        return a_record({"peak_bytes": peak(), "step_s": step(1.0)}, case=case)

    first, second = compare(plan, run, lambda _: None).results
    assert (first.pairs, second.error) == (1, "unmeasured")
    assert {one.metric: one.verdict for one in first.rows} == {
        "peak_bytes": Verdict.PASS,
        "step_s": Verdict.INCONCLUSIVE,
    }
    assert "--budget" in second.reason


def test_by_default_tiny_cases_are_compared_within_three_minutes() -> None:
    """The default budget of tiny cases is below three minutes, and with a full-size case among them ten."""
    assert default_budget_s(TINY) < 180
    assert default_budget_s(TINY[:1]) == default_budget_s(TINY)
    assert default_budget_s((*TINY, FULL[0])) == default_budget_s(FULL) == 600


def test_a_long_case_does_not_starve_the_others() -> None:
    """The next pair goes to the case that has cost least, so a short case is decided before a long one's second pair."""
    ran: list[str] = []

    def run(_: SideName, case: Case, _again: bool) -> Record:
        ran.append(case.id)
        time.sleep(0.04 if case is CASE else 0.001)
        return a_record({"step_s": step(1.0)}, case=case)

    compare(Plan(cases=(CASE, OTHER)), run, lambda _: None)
    assert ran == [CASE.id] * 2 + [OTHER.id] * 6 + [CASE.id] * 4


@given(base=st.integers(1, 2**40), head=st.integers(1, 2**40), better=st.sampled_from(["lower", "higher", "same"]))
def test_one_byte_is_a_difference(base: int, head: int, better: str) -> None:
    """Equal bytes pass; one byte is a difference, worse or better by the metric's direction."""
    sides = [[a_record({"peak_bytes": peak(value, better=better)})] for value in (base, head)]
    (difference,) = exact_rows(CASE, *sides)
    assert difference.differs == (base != head)
    expected = Verdict.IMPROVED if (head < base, better) in ((True, "lower"), (False, "higher")) else Verdict.REGRESSED
    assert difference.verdict is (Verdict.PASS if base == head else expected)


def test_a_limit_of_the_case_applies() -> None:
    """A peak within the case's limit of 1 % passes, and the difference is shown."""
    case = a_case(limits=Limits(peak_bytes="1%"))
    (difference,) = exact_rows(case, [a_record({"peak_bytes": peak(10000)})], [a_record({"peak_bytes": peak(10100)})])
    assert (difference.verdict, difference.differs) == (Verdict.PASS, True)


def test_counts_that_vary_on_one_side_decide_nothing() -> None:
    """An exact metric that differs between processes of one side is INCONCLUSIVE, with its range."""
    records = [a_record({"operators": counted(value)}) for value in (10, 12)]
    (difference,) = exact_rows(CASE, records, [a_record({"operators": counted(10)})] * 2)
    assert difference.verdict is Verdict.INCONCLUSIVE
    assert "10 → 12" in difference.reason


def test_a_metric_of_one_side_only_is_incompatible() -> None:
    """A metric that only head measures is shown as INCOMPATIBLE."""
    (difference,) = exact_rows(CASE, [a_record({})], [a_record({"operators": counted()})])
    assert (difference.verdict, difference.differs, difference.base) == (Verdict.INCOMPATIBLE, True, None)


@pytest.mark.parametrize(
    ("base", "head", "kind", "codes"),
    [
        (a_record(), failed_record(), "broken", (11, 11)),
        (failed_record("missing_library"), failed_record("missing_library"), "missing", (0, 10)),
        (a_record(), failed_record("missing_library"), "missing", (11, 11)),
        (a_record(), a_record(status="invalid", reasons=("other dtype.",)), "invalid", (1, 1)),
    ],
    ids=["head breaks", "missing on both sides", "missing on one side", "head is invalid"],
)
def test_a_side_without_numbers_is_a_row(base: Record, head: Record, kind: str, codes: tuple[int, int]) -> None:
    """A failed side has its reason in a row, no number is compared, and the other cases go on."""
    comparison, order = compared(lambda side, _: base if side == "base" else head, (CASE, OTHER), exact_only=True)
    assert order == ["base", "head"] * 2
    assert {result.error for result in comparison.results} == {kind if codes[0] != 11 else "broken"}
    assert "head: " in comparison.results[0].reason
    assert (comparison.exit_code(), comparison.exit_code(strict=True)) == codes


def test_a_tree_that_changes_meanwhile_ends_the_run() -> None:
    """A tree that changed while it was measured ends the run."""

    def check() -> None:
        raise SpecError("the tree changed")

    processes = timed(itertools.repeat(1.0), itertools.repeat(1.0))
    with pytest.raises(SpecError, match="changed"):
        compare(Plan(cases=(CASE,)), lambda side, _, _again: processes(side, 0), lambda _: None, check=check)


def test_false_alarms_are_shared_by_all_timed_metrics() -> None:
    """A case at the limit is REGRESSED alone and undecided among two thousand metrics that share alpha."""
    base, head = [1.0, 1.0, 1.0, 1.0], [1.22, 1.2, 1.24, 1.21]
    metric = step(1.0)
    alone = Rule().sequential(CASE, "step_s", metric, 1).check(base, head)
    among = Rule().sequential(CASE, "step_s", metric, 2000).check(base, head)
    assert (alone.verdict, among.verdict) == (Verdict.REGRESSED, None)
