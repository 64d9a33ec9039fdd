"""A memory budget gives the cheapest plan within it, or is refused with both numbers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_core.case.errors import BuildError
from hpc_core.engines.tuned.memory_budget import HalfCost, Plan, Sizes, plan_for

sizes = st.builds(
    Sizes,
    layers=st.integers(1, 6),
    fixed_bytes=st.integers(0, 1000),
    end_bytes=st.integers(0, 800),
    attention=st.builds(HalfCost, saved_bytes=st.integers(1, 99), again_s=st.integers(1, 99)),
    mlp=st.builds(HalfCost, saved_bytes=st.integers(1, 99), again_s=st.integers(1, 99)),
)


@settings(max_examples=200, deadline=None)
@given(size=sizes, budget=st.integers(0, 2500), more=st.integers(0, 300))
def test_a_plan_fits_its_budget_and_a_larger_one_costs_no_more(size: Sizes, budget: int, more: int) -> None:
    """A plan is within its budget, and a larger budget never takes more time or is refused."""

    def seconds(plan: Plan) -> float:
        return plan.attentions * size.attention.again_s + plan.mlps * size.mlp.again_s

    try:
        plan = plan_for(size, budget)
    except BuildError:
        least = size.fixed_bytes + max(size.attention.saved_bytes, size.mlp.saved_bytes)
        assert budget < max(least, size.end_bytes)
        return
    assert plan.peak_bytes <= budget
    assert seconds(plan_for(size, budget + more)) <= seconds(plan)


def test_enough_room_recomputes_nothing() -> None:
    """If everything fits, nothing is recomputed."""
    size = Sizes(2, 100, 0, HalfCost(10, 1), HalfCost(30, 5))
    assert plan_for(size, 180) == Plan(0, 0, 180)


def test_too_little_is_refused_with_the_numbers() -> None:
    """The refusal gives the budget and the least that is needed."""
    gib = 1024**3
    size = Sizes(2, 4 * gib, 0, HalfCost(gib // 2, 1), HalfCost(gib, 5))
    with pytest.raises(BuildError, match=r"budget of 4\.500 GiB .* needs 5\.000 GiB, 4\.000 GiB"):
        plan_for(size, 9 * gib // 2)
