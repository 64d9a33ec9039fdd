"""Trainings as their documentation shows them are measured, audited and predicted without a change."""

from __future__ import annotations

import pytest

from hpc_core.case.case import Case
from hpc_core.case.workloads import CallableSpec
from hpc_core.record.job import Job
from hpc_core.record.record import Record
from hpc_core.worker.perform import perform
from tests.predict.predicting import predicted

pytestmark = [pytest.mark.nightly, pytest.mark.filterwarnings("ignore")]


def _case(name: str) -> Case:
    factory = f"tests.integrations.documented_scripts:{name}"
    return Case(id="own/script", scale="tiny", workload=CallableSpec(factory=factory, steps=2))


def _gated_exactly(record: Record) -> dict[str, float]:
    """Numbers that a second run must give again; waits are those of a busy machine."""
    exact = {name: metric for name, metric in record.metrics.items() if metric.gated and metric.noise == "exact"}
    return {name: metric.value for name, metric in exact.items() if name != "waits"}


@pytest.mark.parametrize("name", ["by_hand", "by_trainer"])
def test_a_documented_script_is_gated_audited_and_predicted(name: str) -> None:
    """All 21 tensors get gradients and move, weights and optimizer have owners, and a second run gives the same bytes and operators."""
    job = Job(case=_case(name), device="cpu")
    first, second = (perform(job, lambda _: None) for _ in range(2))
    assert (first.status, first.reasons) == ("ok", ())
    assert {name: fact.seen for name, fact in first.audit.items()} == {
        "gradients": "21 of 21 reached", "weights": "moved", "losses": "finite",
    }  # fmt: skip
    numbers, again = _gated_exactly(first), _gated_exactly(second)
    assert {"peak_bytes", "operators", "flops", "bytecodes"} <= {*numbers}
    assert numbers["at_peak_optimizer_bytes"] > 2 * numbers["at_peak_weights_bytes"]  # two moments, and counts of steps
    for each in ("peak_bytes", "operators", "flops"):
        assert numbers[each] == again[each]
    (on_gpu,) = predicted([_case(name)])
    assert (on_gpu.status, on_gpu.failure) == ("ok", None)
    held = numbers["at_peak_weights_bytes"] + numbers["at_peak_optimizer_bytes"]
    assert on_gpu.metrics["peak_bytes"].value > held
