"""What the audit costs: no exact number, and its record is void without it."""

from __future__ import annotations

import pytest

from hpc_core.catalogue import catalogue
from hpc_core.record.job import Job, Measure
from hpc_core.worker.perform import perform

_OF_THE_RUN = {"new_tokens", "losses_finite"}
"""Facts that the timed run itself gives; nothing is done for them."""


@pytest.mark.parametrize("case_id", ["tiny/lora-padded", "tiny/qlora-gc", "tiny/full-bf16", "tiny/generate-nf4"])
def test_peaks_and_operators_are_the_same_without_the_audit(case_id: str) -> None:
    """Everything that is gated exactly is equal with and without; without it the record is INVALID and says why."""
    case = catalogue()[case_id]
    checked, unchecked = (perform(Job(case=case, kind=Measure(audit=audit)), lambda _: None) for audit in (True, False))
    exact = [
        {name: metric.value for name, metric in record.metrics.items() if metric.noise == "exact" and metric.gated}
        for record in (checked, unchecked)
    ]
    assert {"peak_bytes", "operators", "flops"} <= set(exact[0])
    assert exact[0] == exact[1]
    assert checked.status == "ok"
    assert (unchecked.status, unchecked.reasons) == (
        "invalid",
        ("The audit was switched off: what ran was not checked, so its numbers prove nothing.",),
    )
    assert set(unchecked.audit) <= _OF_THE_RUN < set(checked.audit) | _OF_THE_RUN
    assert {"audit", "equivalence"}.isdisjoint(unchecked.circumstances.phase_s)
