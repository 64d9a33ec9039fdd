"""The clock of a recorded training: which seconds belong to a step, and which are left out."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_core.integrations.training import StepClock, thinned

SECONDS = st.integers(0, 10**6)


@given(
    wait=SECONDS,
    steps=st.lists(st.tuples(SECONDS, st.lists(SECONDS, max_size=3), st.booleans()), min_size=1, max_size=20),
)
def test_each_second_belongs_to_a_step_or_to_a_pause(wait: int, steps: list[tuple[int, list[int], bool]]) -> None:
    """Samples are the seconds of the steps, and exactly the pauses between them are left out."""
    now = 0.0
    clock = StepClock(lambda: now)
    now += wait
    for seconds, pauses, keep in steps:
        clock.step_begins()
        now += seconds
        clock.step_ended(keep=keep)
        for pause in pauses:
            now += pause
            clock.resume()
    assert clock.samples == [seconds for seconds, _, keep in steps if keep]
    assert clock.left_out_s == sum(sum(pauses) for _, pauses, _ in steps)
    assert clock.first_step_s == wait + steps[0][0]


def test_loading_data_is_part_of_a_step() -> None:
    """Time between two steps that is not reported as a pause belongs to the later step."""
    times: Iterator[float] = iter([0.0, 1.0, 3.0, 9.0])
    clock = StepClock(lambda: next(times))
    clock.step_begins()
    clock.step_ended()
    clock.step_begins()  # 2 s after the end, without a pause
    clock.step_ended()
    assert clock.samples == [2.0, 6.0]


@given(samples=st.lists(st.floats(0, 1), max_size=60), most=st.integers(1, 40))
def test_thinned_samples_are_some_of_the_samples_in_order(samples: list[float], most: int) -> None:
    """Up to the limit all samples stay; beyond it, as many as allowed, in order and from the first on."""
    thinned_samples = thinned(list(enumerate(samples)), most)  # type: ignore[arg-type]  # numbered, to tell equal ones apart
    assert len(thinned_samples) == min(len(samples), most)
    assert list(thinned_samples) == sorted(thinned_samples)
    assert len(samples) <= most or thinned_samples[0][0] == 0  # type: ignore[index]


def test_keeping_no_sample_is_refused() -> None:
    """A limit below one sample is an error."""
    with pytest.raises(ValueError, match="At least one sample"):
        thinned([1.0], 0)
