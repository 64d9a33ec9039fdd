"""What the study of clocks makes of device records: steps between spinning kernels, and how time follows the clock."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.studies.clocks.clocks import LOADS, show, slope, steps_of, worst_of_law
from hpc_core.instruments.kernels import Interval

HOST_NS, SPIN_NS = 5_000_000_000, 100_000


def kernel(name: str, start_ns: int, end_ns: int) -> Interval:
    return Interval(name, "kernel", 7, start_ns, end_ns)


def test_a_step_lies_between_two_spinning_kernels() -> None:
    """Burning products before it and readings outside it do not count; its clock is that of its own readings."""
    spun = [kernel("spin_kernel", start, start + SPIN_NS) for start in (0, 500_000, 9_000_000, 19_900_000, 40_000_000)]
    burn = kernel("nvjet_burn", 1_000_000, 8_000_000)
    step = [kernel("nvjet_a", 9_200_000, 15_200_000), kernel("elementwise", 15_200_000, 17_200_000)]
    readings = [(HOST_NS + at, 1980 if at < 8_000_000 else 1650, 4) for at in range(0, 30_000_000, 2_000_000)]
    (row,) = steps_of([*spun, burn, *step], readings, HOST_NS)
    assert row["busy_s"] == pytest.approx(8e-3)
    assert row["families"] == pytest.approx({"gemm": 6e-3, "elementwise": 2e-3})
    assert (row["mhz"], row["capped"]) == (1650, 1)
    assert row["spin_mhz"] == pytest.approx([2000, 2000])


def rows_at(follows: float) -> list[dict[str, Any]]:
    """Steps of 50 ms at 1980 MHz, of which this share follows the clock."""
    return [
        {
            "load": load, "mhz": mhz, "least_mhz": mhz, "most_mhz": mhz, "capped": 0.0, "spin_mhz": [mhz],
            "busy_s": 0.05 * (1980 / mhz) ** follows, "families": {"gemm": 0.04 * (1980 / mhz) ** follows},
        }
        for load, mhz in zip(LOADS, (1980, 1900, 1750, 1600), strict=True)
    ]  # fmt: skip


@given(st.floats(0, 1.5))
def test_how_time_follows_the_clock_is_found(follows: float) -> None:
    """The slope is that of the made-up steps, and only time that grows by more than the clock breaks the law."""
    found, error = slope(rows_at(follows), lambda row: row["busy_s"])
    assert found == pytest.approx(follows, abs=1e-6)
    assert error == pytest.approx(0, abs=1e-6)
    assert (worst_of_law(rows_at(follows)) > 1e-9) == (follows > 1 + 1e-9)


def test_equal_clocks_tell_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Without another clock there is no slope, and the table has nan in its place."""
    rows = [row | {"mhz": 1980} for row in rows_at(0)]
    assert all(math.isnan(each) for each in slope(rows, lambda row: row["busy_s"]))
    show("a step", {"step_s": 0.05, "steps": rows})
    assert "follows the clock by nan" in capsys.readouterr().out
