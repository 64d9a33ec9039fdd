"""Change points of exact values, and of noisy values beyond what chance explains."""

from __future__ import annotations

import random
from math import comb

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_core.gate.change_points import ALPHA, exact_changes, least_points, noisy_changes

floats = st.floats(0.1, 10, allow_nan=False)


def drawn(seed: int, *levels: tuple[int, float], spread: float = 0.01) -> list[float]:
    """Return this many values around each level."""
    generator = random.Random(seed)
    return [level * (1 + generator.gauss(0, spread)) for many, level in levels for _ in range(many)]


@given(st.lists(st.integers(0, 3), max_size=12))
def test_exact_metrics_change_where_their_value_does(values: list[int]) -> None:
    """Replaying the changes from the first value gives the series again."""
    changes = exact_changes(values)
    by_index = {change.index: change for change in changes}
    level: float = values[0] if values else 0
    for index, value in enumerate(values):
        if index in by_index:
            assert by_index[index].before == level
            assert by_index[index].after == value != level
        level = by_index[index].after if index in by_index else level
        assert value == level


@pytest.mark.parametrize("half", [4, 5, 10])
def test_a_step_is_found_where_it_is(half: int) -> None:
    """A step of five times the noise is one change point at its place, with the levels on both sides."""
    [change] = noisy_changes(drawn(3, (half, 1.0), (half, 1.05)))
    assert change.index == half
    assert change.before == pytest.approx(1.0, rel=0.01)
    assert change.after == pytest.approx(1.05, rel=0.01)
    assert change.p is not None
    assert change.p <= ALPHA


def test_several_steps_are_found() -> None:
    """A slower period is two change points, in order."""
    assert [change.index for change in noisy_changes(drawn(5, (12, 1.0), (12, 1.1), (12, 1.0)))] == [12, 24]


@given(st.lists(floats, min_size=8, max_size=16, unique=True), st.floats(1, 1e6))
@settings(max_examples=30)
def test_a_spike_counts_no_more_than_any_largest_value(values: list[float], factor: float) -> None:
    """However large the largest value is, the change points are the same."""
    wild = [value * factor if value == max(values) else value for value in values]
    assert [change.index for change in noisy_changes(wild)] == [change.index for change in noisy_changes(values)]


def test_unmoved_series_rarely_show_a_change() -> None:
    """Of 200 unmoved series, some heavy-tailed, at most 29 show a change.

    At 5 % ten are expected. By the binomial distribution more than 29 have a chance below 1e-6.
    """
    many, most = 200, 29
    chance = ALPHA + 1 / 2000
    beyond = sum(comb(many, k) * chance**k * (1 - chance) ** (many - k) for k in range(most + 1, many + 1))
    assert beyond < 1e-6
    generator = random.Random(11)
    alarms = 0
    for number in range(many):
        tail = 0.2 if number % 2 else 0.0
        values = [
            generator.gauss(0, 1) + (generator.expovariate(0.2) if generator.random() < tail else 0) for _ in range(10)
        ]
        alarms += bool(noisy_changes(values))
    assert 0 < alarms <= most  # without any alarm, nothing would have been tested


def test_too_few_points_show_no_change() -> None:
    """Below eight points no order is rarer than one in twenty, so even a large step is no change point."""
    assert least_points() == 8
    assert noisy_changes([1.0] * 3 + [100.0] * 4) == ()
    assert noisy_changes([1.0, 1.1, 1.2, 1.3, 100.0, 101.0, 102.0, 103.0]) != ()


@given(st.lists(floats, min_size=8, max_size=16), st.floats(0.01, 100))
@settings(max_examples=30)
def test_units_do_not_matter(values: list[float], factor: float) -> None:
    """A series in another unit has the same change points, and equal values have none."""
    indices = [change.index for change in noisy_changes(values)]
    scaled = [change.index for change in noisy_changes([value * 2.0 ** round(factor) for value in values])]
    assert scaled == indices
    assert noisy_changes([factor] * len(values)) == ()
