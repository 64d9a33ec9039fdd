"""Numbers as people read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_core.record.units import change, counted, pair, percent, quantity


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "bytes", "0 B"),
        (1, "bytes", "1 B"),
        (1536, "bytes", "1.50 KiB"),
        (2018634629, "bytes", "1.88 GiB"),
        (-3 * 2**20, "bytes", "-3.00 MiB"),
        (0.0, "s", "0 s"),
        (0.003, "s", "3.00 ms"),
        (12.5, "s", "12.50 s"),
        (1617, "1", "1,617"),
        (1.5e13, "FLOP", "15.00 TFLOP"),
        (12.345, "tokens/s", "12.35 tokens/s"),
        (1e300, "s", "1e+300 s"),
        (52940, "1 per 10 steps", "52,940 per 10 steps"),
        (3944e8, "FLOP per prefill and 4 tokens", "394.40 GFLOP per prefill and 4 tokens"),
    ],
)
def test_quantity(value: float, unit: str, text: str) -> None:
    """A value is printed in the unit that is easiest to read."""
    assert quantity(value, unit) == text


def test_change_and_pair() -> None:
    """A change has a sign; a pair has enough digits to differ."""
    assert (change(2018634629, "bytes"), change(-1, "1"), change(0, "bytes")) == ("+1.88 GiB", "-1", "+0 B")
    assert pair(1617, 1645, "1") == "1,617 → 1,645"
    assert pair(52940, 53220, "1 per 10 steps") == "52,940 → 53,220 per 10 steps"
    assert pair(0.0047183690625, 0.004724443375, "s") == "4.718 ms → 4.724 ms"
    assert pair(2018634629, 2018634630, "bytes") == "2,018,634,629 → 2,018,634,630 bytes"


@pytest.mark.parametrize(
    ("ratio", "text"),
    [(0.032, "+3.2 %"), (-0.5, "-50 %"), (0.0005, "+0.05 %"), (2e-7, "+0.00002 %"), (12.5, "+1,250 %"), (0.0, "+0 %")],
)
def test_percent(ratio: float, text: str) -> None:
    """A ratio is printed as a percentage."""
    assert percent(ratio) == text


@given(st.floats(min_value=-1e6, max_value=1e6, allow_subnormal=False).filter(bool))
def test_a_difference_never_prints_as_zero(ratio: float) -> None:
    """However small a difference is, it does not print as zero."""
    assert float(percent(ratio).removesuffix(" %").replace(",", "")) != 0
    for unit in ("bytes", "s", "FLOP", "1", "ratio"):
        assert float(change(ratio, unit).partition(" ")[0].replace(",", "")) != 0


def test_a_count_agrees_with_its_noun() -> None:
    """One is singular, every other count plural, with an irregular plural where one is given."""
    assert [counted(count, "day") for count in (0, 1, 2)] == ["0 days", "1 day", "2 days"]
    assert counted(3, "process", "processes") == "3 processes"
