"""Work of known size on a CPU, by the factories that `bench/test_instruments.py` uses on a GPU."""

from __future__ import annotations

from typing import Any

import pytest

from hpc_core.case.case import Case
from hpc_core.case.workloads import CallableSpec
from hpc_core.record.record import Record
from tests.tiny_cases import measured


def _record(factory: str, **arguments: Any) -> Record:
    workload = CallableSpec(
        factory=f"hpc_core.instruments.known:{factory}", arguments=arguments | {"device": "cpu"}, steps=2
    )
    return measured(Case(id=f"known/{factory}", scale="tiny", workload=workload))[0]


def test_a_schedule_of_allocations_is_measured_exactly() -> None:
    """Peaks by phase, and categories at the peak, are exactly those of the schedule."""
    unit = 1_000_003
    values = {name: metric.value for name, metric in _record("scheduled", unit_bytes=unit).metrics.items()}
    assert (values["peak_bytes"], values["peak_first_bytes"], values["peak_second_bytes"]) == (
        7 * unit, 7 * unit, 5 * unit,
    )  # fmt: skip
    assert values["at_peak_temporaries_bytes"] == 4 * unit
    assert values["at_peak_activations_bytes"] == unit
    assert values["at_peak_other_bytes"] == 2 * unit


def test_launches_are_counted_as_operators() -> None:
    """Additions, copies and fills count as one operator each."""
    assert _record("launching", kernels=37, copies=3, fills=2).metrics["operators"].value == 42


@pytest.mark.parametrize("times", [1, 5])
def test_products_have_the_flops_of_their_sizes(times: int) -> None:
    """A product takes two FLOPs per multiply-add."""
    record = _record("multiplying", rows=8, inner=32, columns=16, times=times, dtype="float32")
    assert record.metrics["flops"].value == times * 2 * 8 * 32 * 16
