"""Limits: percentages and absolute numbers, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest

from hpc_core.case.errors import SpecError
from hpc_core.case.limits import GiB, Limits, MiB, relative_limit


@pytest.mark.parametrize(
    ("text", "ratio"), [("1%", 0.01), ("0.05 %", 0.0005), ("0%", 0.0), ("100%", 1.0), (8 * GiB, None), (None, None)]
)
def test_relative_limit(text: Any, ratio: float | None) -> None:
    """A percentage is a ratio; an absolute limit has none."""
    assert relative_limit(text) == (None if ratio is None else pytest.approx(ratio))


@pytest.mark.parametrize("text", ["1", "-1%", "1 percent", "%", "1e3%", "1%\n", "٣%", "nan%", "", "1" * 400 + "%"])
def test_refused_percentages(text: str) -> None:
    """A malformed percentage is refused: the message names the limit, and what is allowed."""
    with pytest.raises(
        SpecError, match=r'Limits\(peak_bytes=.*: a limit is a percentage such as "5%" or a finite .* in bytes'
    ):
        Limits(peak_bytes=text)


@pytest.mark.parametrize("number", [0, -1, -0.0, math.nan, math.inf, 10**400, True, [1]])
def test_refused_numbers(number: Any) -> None:
    """A limit must be a finite number above 0."""
    with pytest.raises(SpecError, match="or a finite number above 0"):
        Limits(operators=number)


def test_a_name_that_is_no_limit() -> None:
    """The message suggests the name that was meant, and lists all."""
    with pytest.raises(SpecError, match=r"Limits has no steps_s\. Did you mean step_s\? There are: peak_bytes, "):
        Limits(steps_s="1%")  # type: ignore[call-arg]
    with pytest.raises(SpecError, match=r"Limits has no wall_s\. There are: .* step_s, query_s, time_to_first_token_s"):
        Limits(wall_s="20%")  # type: ignore[call-arg]


@pytest.mark.parametrize("name", ["recompilations", "waits", "synchronizations"])
def test_what_need_not_happen_may_be_limited_to_0(name: str) -> None:
    """0 is the natural limit of some counts; every step has operators, for which it is refused."""
    assert Limits(**{name: 0}).named() == {name: 0}


def test_named() -> None:
    """Only limits that were set are named."""
    assert Limits(peak_bytes="1%", kernels=2 * MiB).named() == {"peak_bytes": "1%", "kernels": 2 * MiB}
    assert Limits().named() == {}
