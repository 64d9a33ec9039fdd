"""Laws of the gate, as properties."""

from __future__ import annotations

import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hpc_core.baselines.accept import accept
from hpc_core.baselines.baseline import Baseline, gated_metrics
from hpc_core.baselines.lookup import find
from hpc_core.case.limits import Limits, MiB
from hpc_core.gate.intervals import SPREADS, three_way
from hpc_core.gate.judge import judge
from hpc_core.gate.verdict import Judgement, Verdict
from hpc_core.record.record import Metric, Record
from tests.gate.judging import busy_interval, paired_interval, stored
from tests.strategies import a_record, busy, counted, metrics, names, peak, percentages, records

GOODNESS = [Verdict.IMPROVED, Verdict.PASS, Verdict.INCONCLUSIVE, Verdict.REGRESSED]
values = st.integers(1, 2**45)
directions = st.sampled_from(["lower", "higher", "same"])
levels = st.floats(1e-5, 0.2)
tolerances = st.floats(0.001, 0.1)
families = st.sampled_from(list(SPREADS.values()))
processes = st.lists(st.floats(0.9, 1.1), min_size=1, max_size=4)
stored_sessions = st.lists(processes, min_size=1, max_size=7)
shifts = st.integers(-(2**33), 2**33) | st.integers(-3, 3) | st.integers(-3 * MiB, 3 * MiB)


def judged(old: Metric, new: Metric, limits: Limits | None = None) -> Judgement:
    return judge(a_record({"peak_bytes": new}), stored({"peak_bytes": old}), limits or Limits())


@given(values, shifts, directions, st.booleans())
def test_exact_never_passes_beyond_its_tolerance(old: int, shift: int, better: Any, allocator: bool) -> None:
    """An allocator's bytes pass within max(2 MiB, 0.05 %), counted bytes within 0.05 %, and neither beyond."""
    assume(old + shift > 0)
    depends: Any = ("case", "stack", "machine") if allocator else ("case", "stack")
    fields: dict[str, Any] = {"better": better, "depends_on": depends}
    verdict = judged(peak(old, **fields), peak(old + shift, **fields)).verdict
    allowed = max(2 * MiB if allocator else 0, old * 0.0005)
    assert (verdict is Verdict.PASS) == (abs(shift) <= allowed)
    if verdict is not Verdict.PASS:
        worse = {"lower": shift > 0, "higher": shift < 0, "same": True}[better]
        assert verdict is (Verdict.REGRESSED if worse else Verdict.IMPROVED)


@given(st.integers(0, 2**50), st.integers(0, 2**50), st.sampled_from(["1", "FLOP"]))
def test_counts_pass_only_if_equal(old: int, new: int, unit: str) -> None:
    """A count or FLOPs that differ by one do not pass."""
    for value in (new, old, old + 1):
        verdict = judged(counted(old, unit=unit), counted(value, unit=unit)).verdict
        assert (verdict is Verdict.PASS) == (value == old)


@given(values, values, values, percentages, st.sampled_from([peak, counted, busy]))
def test_worse_is_never_judged_better(old: int, one: int, other: int, percentage: str, make: Any) -> None:
    """A worse value never gets a better verdict, with the default tolerance, a relative limit or a ceiling."""
    good, bad = sorted((one, other))
    for limits in (Limits(), Limits(peak_bytes=percentage), Limits(peak_bytes=old)):
        first, second = (judged(make(old), make(value), limits).verdict for value in (good, bad))
        assert GOODNESS.index(first) <= GOODNESS.index(second)
        mirrored = [judged(make(old, better="higher"), make(v, better="higher")).verdict for v in (bad, good)]
        assert GOODNESS.index(mirrored[0]) <= GOODNESS.index(mirrored[1])


@given(st.dictionaries(names, metrics(), min_size=1, max_size=6), st.randoms(use_true_random=False), st.data())
def test_order_does_not_matter(metrics_by_name: dict[str, Metric], random: Any, data: st.DataObject) -> None:
    """The order of metrics, in the record or in the baseline, changes nothing."""
    permuted = dict(data.draw(st.permutations(list(metrics_by_name.items()))))
    shuffled = list(metrics_by_name.items())
    random.shuffle(shuffled)
    accepted = {name: metric for name, metric in shuffled if metric.gated}
    assume(accepted)
    worse = {name: data.draw(metrics()) for name in accepted}
    assert judge(a_record(metrics_by_name), stored(gated_metrics(a_record(metrics_by_name)))) == judge(
        a_record(permuted), stored(accepted)
    )
    backwards = dict(reversed(list(worse.items())))
    assert judge(a_record(worse), stored(accepted)) == judge(a_record(backwards), stored(accepted))


@given(records(acceptable=True))
@settings(max_examples=30)
def test_what_was_accepted_passes(record: Record) -> None:
    """Accept, find, judge: any record that may be a baseline passes against itself."""
    with tempfile.TemporaryDirectory() as folder:
        accept(Path(folder), record, reason="r")
        lookup = find(Path(folder), record.circumstances.machine.key, record.case.id)
        assert isinstance(lookup, Baseline)
        assert judge(record, lookup, Limits()).verdict is Verdict.PASS


@given(st.dictionaries(names, metrics(), min_size=1, max_size=4), metrics())
def test_a_new_metric_changes_no_verdict(metrics_by_name: dict[str, Metric], new: Metric) -> None:
    """A metric that the baseline lacks changes no verdict or row of other metrics, unless it is INVALID itself."""
    record = a_record(metrics_by_name)
    accepted = stored(gated_metrics(record))
    assume(accepted.metrics and "new" not in metrics_by_name and new.value > 0)
    before, after = judge(record, accepted), judge(a_record(metrics_by_name | {"new": new}), accepted)
    assert after.verdict is before.verdict
    assert [row for row in after.metrics if row.metric != "new"] == list(before.metrics)


@given(records(), st.dictionaries(names, metrics(), max_size=4))
def test_judging_never_raises_and_always_explains(record: Record, metrics_by_name: dict[str, Metric]) -> None:
    """Any record against any baseline gives a verdict, and each but PASS says why and what to do."""
    judgement = judge(record, stored(metrics_by_name))
    assert judgement.headline
    for row in judgement.metrics:
        assert row.reason
        assert row.verdict is Verdict.PASS or row.next_step


@given(
    processes, stored_sessions, families, levels, tolerances, st.floats(1.0, 1.2), st.sampled_from(["lower", "higher"])
)
def test_busy_time_that_is_worse_is_never_judged_better(
    new: list[float], old: list[list[float]], spread: Any, alpha: float, allowed: float, factor: float, better: Any
) -> None:
    """A session whose every process is slower never gets a better verdict, nor a faster one where higher is better."""
    slower = [value * factor for value in new]
    verdicts = [three_way(busy_interval(each, old, spread, alpha), allowed, better) for each in (new, slower)]
    good, bad = verdicts if better == "lower" else reversed(verdicts)
    assert GOODNESS.index(good) <= GOODNESS.index(bad)


@given(processes, stored_sessions, families, levels, st.floats(0.001, 1000.0))
def test_the_unit_of_time_does_not_matter(
    new: list[float], old: list[list[float]], spread: Any, alpha: float, scale: float
) -> None:
    """Milliseconds give the same interval as seconds."""
    one = busy_interval(new, old, spread, alpha)
    other = busy_interval([v * scale for v in new], [[v * scale for v in each] for each in old], spread, alpha)
    assert (other.low, other.pass_high) == pytest.approx((one.low, one.pass_high), rel=1e-6, abs=1e-9)


@given(processes, stored_sessions, families, levels, tolerances)
def test_directions_mirror_each_other(
    new: list[float], old: list[list[float]], spread: Any, alpha: float, allowed: float
) -> None:
    """An interval and its mirror image get one verdict where lower and where higher is better; "same" takes the worse one."""
    interval = busy_interval(new, old, spread, alpha)
    mirrored = msgspec.structs.replace(
        interval, low=-interval.high, high=-interval.low, pass_low=-interval.pass_high, pass_high=-interval.pass_low
    )
    lower, higher = three_way(interval, allowed, "lower"), three_way(interval, allowed, "higher")
    assert three_way(mirrored, allowed, "higher") is lower
    assert three_way(mirrored, allowed, "lower") is higher
    assert (three_way(interval, allowed, "same") is Verdict.REGRESSED) == (Verdict.REGRESSED in (lower, higher))
    assert (three_way(interval, allowed, "same") is Verdict.PASS) == (lower is higher is Verdict.PASS)


@given(processes, stored_sessions, families, levels, st.floats(0.0, 1.0), tolerances)
def test_a_smaller_alpha_decides_no_more(
    new: list[float], old: list[list[float]], spread: Any, alpha: float, share: float, allowed: float
) -> None:
    """Allowing fewer false alarms never makes anything REGRESSED, and never changes what passes."""
    tighter = max(alpha * share, 1e-9)
    one, other = (three_way(busy_interval(new, old, spread, level), allowed, "lower") for level in (alpha, tighter))
    assert (other is Verdict.REGRESSED) <= (one is Verdict.REGRESSED)
    if alpha <= 0.05:
        assert (other is Verdict.PASS) == (one is Verdict.PASS)


@given(st.lists(processes, min_size=2, max_size=7), families, levels, tolerances, st.floats(1.0, 4.0), st.booleans())
def test_more_spread_decides_no_more(
    drawn: list[list[float]], spread: Any, alpha: float, allowed: float, factor: float, within: bool
) -> None:
    """The same medians, further apart between or within sessions, never decide what was undecided."""
    new, *old = drawn
    middle = math.exp(statistics.fmean(math.log(statistics.median(each)) for each in old))

    def wider(session: list[float]) -> list[float]:
        centre = statistics.median(session)
        if within:
            return [centre * (value / centre) ** factor for value in session]
        return [value / centre * middle * (centre / middle) ** factor for value in session]

    before = busy_interval(new, old, spread, alpha)
    after = busy_interval(wider(new) if within else new, [wider(each) for each in old], spread, alpha)
    assume(after.centre == pytest.approx(before.centre, abs=1e-9))  # stretching two values moves their median
    assert after.low <= before.low + 1e-9
    assert after.pass_high >= before.pass_high - 1e-9
    graver = three_way(before, allowed, "lower")
    assume(min(abs(before.low - allowed), abs(before.pass_high - allowed), abs(before.pass_high + allowed)) > 1e-8)
    assert graver is not Verdict.INCONCLUSIVE or three_way(after, allowed, "lower") is Verdict.INCONCLUSIVE


@given(st.lists(st.tuples(st.floats(0.9, 1.1), st.floats(0.9, 1.1)), min_size=2, max_size=12), st.floats(0.01, 0.2))
def test_an_ab_reads_the_same_backwards(pairs: list[tuple[float, float]], alpha: float) -> None:
    """Base and head exchanged give the inverse interval, in any order of the pairs."""
    base, head = ([pair[side] for pair in pairs] for side in (0, 1))
    forth, back = paired_interval(base, head, alpha), paired_interval(head[::-1], base[::-1], alpha)
    assert (1 + forth.low) * (1 + back.high) == pytest.approx(1, rel=1e-6)
    assert (1 + forth.centre) * (1 + back.centre) == pytest.approx(1, rel=1e-6)
