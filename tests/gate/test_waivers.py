"""Waivers never hide more than their limit, never hold a day too long, and report every mistake."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_core.case.errors import SpecError
from hpc_core.gate.judge import judge
from hpc_core.gate.verdict import Judgement, Verdict
from hpc_core.gate.waivers import Waiver, expired, waived, waivers_from_toml
from hpc_core.record.record import Metric, Record
from tests.gate.judging import stored
from tests.strategies import a_record, busy, counted, peak

TODAY = datetime.date(2026, 11, 24)
ORDER = ["passed", "skipped", "failed"]
values = st.integers(1, 2**42)
percents = st.integers(0, 40)


def waiver(**changes: Any) -> Waiver:
    fields: dict[str, Any] = {"case": "tiny/*", "metric": "peak_bytes", "limit": "+5 %", "reason": "a known bug"}
    return Waiver(**(fields | {"owner": "jane", "expires": TODAY} | changes))


def with_and_without(old: Metric, new: Metric, *more: Waiver) -> tuple[Judgement, Judgement, Record]:
    """Return the judgement without and with waivers, and the record."""
    record = a_record({"peak_bytes": new, "operators": counted()})
    plain = judge(record, stored({"peak_bytes": old, "operators": counted()}))
    return plain, waived(plain, record, more, TODAY), record


def test_a_waived_regression_passes_and_stays_one() -> None:
    """A regression within the limit passes; its verdict stays REGRESSED, with the owner and the days left."""
    over = TODAY + datetime.timedelta(days=12)
    plain, excused, _ = with_and_without(peak(1000 * 2**20), peak(1040 * 2**20), waiver(expires=over))
    assert (plain.outcome(), excused.outcome(), excused.outcome(strict=True)) == ("failed", "passed", "passed")
    assert excused.verdict is Verdict.REGRESSED
    [excuse] = excused.excuses
    assert excuse.text == "waived up to +5 % by jane until 2026-12-06 (12 days left): a known bug"


def test_beyond_its_limit_it_hides_nothing() -> None:
    """A value beyond the limit fails, and the reason says what was waived."""
    _, judgement, _ = with_and_without(peak(1000 * 2**20), peak(1060 * 2**20), waiver())
    assert (judgement.outcome(), judgement.excuses) == ("failed", ())
    assert "waived only up to +5 % by jane" in judgement.metrics[0].reason


@given(
    values,
    values,
    st.sampled_from(["lower", "higher", "same"]),
    percents | values,
    st.sampled_from([peak, busy, counted]),
)
def test_it_never_hides_more_than_its_limit(old: int, new: int, better: Any, limit: int, make: Any) -> None:
    """A test that passes because of a waiver has a value within the waiver's limit."""
    relative = limit <= 40
    one = waiver(limit=f"{limit}%") if relative else waiver(limit=limit)
    plain, excused, _ = with_and_without(make(old, better=better), make(new, better=better), one)
    if plain.outcome() == excused.outcome():
        return
    assert (plain.outcome(), excused.outcome()) == ("failed", "passed")
    if relative:
        worse = {"lower": new - old, "higher": old - new, "same": abs(new - old)}[better]
        assert worse * 100 <= limit * old * (1 + 1e-12)
    else:
        assert {"lower": new <= limit, "higher": new >= limit}.get(better, min(old, limit) <= new <= max(old, limit))


@given(
    st.lists(st.tuples(percents, st.integers(-3, 3), st.sampled_from(["peak_bytes", "operators", "none"])), max_size=4),
    values,
    values,
    st.booleans(),
)
def test_it_never_makes_anything_worse(entries: Any, old: int, new: int, strict: bool) -> None:
    """A waiver changes no verdict and no value, and the outcome is the same or better."""
    given_waivers = [
        waiver(limit=f"{percent}%", expires=TODAY + datetime.timedelta(days=days), metric=metric)
        for percent, days, metric in entries
    ]
    plain, excused, _ = with_and_without(peak(old), peak(new), *given_waivers)
    assert [(row.metric, row.verdict, row.new) for row in plain.metrics] == [
        (row.metric, row.verdict, row.new) for row in excused.metrics
    ]
    assert plain.verdict is excused.verdict
    assert ORDER.index(excused.outcome(strict=strict)) <= ORDER.index(plain.outcome(strict=strict))
    active = {(each.metric) for each in given_waivers if each.expires >= TODAY}
    assert {excuse.metric for excuse in excused.excuses} <= active


def test_its_last_day_counts_and_the_next_does_not() -> None:
    """A waiver holds through its last day; after that it excuses nothing and is reported."""
    last, gone = waiver(), waiver(expires=TODAY - datetime.timedelta(days=3))
    assert with_and_without(peak(1000 * 2**20), peak(1040 * 2**20), last)[1].outcome() == "passed"
    assert with_and_without(peak(1000 * 2**20), peak(1040 * 2**20), gone)[1].outcome() == "failed"
    notice = "waiver of peak_bytes of tiny/* by jane expired on 2026-11-21 (3 days ago): remove it or renew it"
    assert expired([last, gone], TODAY) == expired([last, gone], TODAY, "tiny/lora") == (notice,)
    assert expired([last, gone], TODAY, "small/lora") == ()


GOOD = """
[[waiver]]
case = "tiny/*"
metric = "peak_bytes"
limit = "+5 %"
reason = "a known bug"
owner = "jane"
expires = 2026-11-24
"""


def test_the_file_is_read() -> None:
    """Each entry of the file is a waiver; an absolute limit is a number; a file may have no entry."""
    assert waivers_from_toml(GOOD, "w.toml") == (waiver(),)
    assert waivers_from_toml(GOOD.replace('"+5 %"', "8_000"), "w.toml")[0].limit == 8000
    assert waivers_from_toml("# none now\n", "w.toml") == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD.replace("reason", "because"), "waiver 1: .*because"),
        (GOOD.replace('owner = "jane"\n', ""), "waiver 1: .*owner"),
        (GOOD.replace('"jane"', '" "'), "owner is empty"),
        (GOOD.replace("2026-11-24", '"soon"'), r"waiver 1: .*expires"),
        (GOOD.replace("2026-11-24", "2026-11-24T12:00:00"), "without a time"),
        (GOOD.replace("2026-11-24", "2026-13-24"), "not TOML"),
        (GOOD.replace("+5 %", "-5 %"), "percentage"),
        (GOOD.replace('"+5 %"', "0"), "above 0"),
        (GOOD.replace('"+5 %"', "true"), "waiver 1"),
        (GOOD + GOOD.replace("+5 %", "+9 %"), "waived twice"),
        ("[waiver]\ncase = 'x'", "holds waiver"),
        ("[[waivers]]\ncase = 'x'", "holds waivers"),
        ("waiver = [3]", "waiver 1"),
    ],
)
def test_a_mistake_in_the_file_is_one_clear_error(text: str, expected: str) -> None:
    """Unknown keys, bad dates and limits, missing and repeated entries are named, with the file and the entry."""
    with pytest.raises(SpecError, match=f"(?s)w.toml.*{expected}"):
        waivers_from_toml(text, "w.toml")
