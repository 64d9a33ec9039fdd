"""The audit changes no exact number, and without it a record is INVALID."""

from __future__ import annotations

import pytest

from hpc_core.record.job import Measure
from tests.tiny_cases import TINY_CASES, measured

_FREE = {"new_tokens", "losses_finite"}
"""Facts that the timed run gives anyway."""


@pytest.mark.parametrize("case_id", ["tiny/lora-padded", "tiny/qlora-gc", "tiny/full-bf16", "tiny/generate-nf4"])
def test_peaks_and_operators_are_the_same_without_the_audit(case_id: str) -> None:
    """All gated exact metrics are equal with and without the audit; without it the record is INVALID and says why."""
    # Both now: other tests of this process may patch libraries, which changes what Python executes.
    (audited, _), (unaudited, _) = (measured(TINY_CASES[case_id], Measure(audit=audit)) for audit in (True, False))
    exact, exact_without = (
        {name: metric.value for name, metric in record.metrics.items() if metric.noise == "exact" and metric.gated}
        for record in (audited, unaudited)
    )
    assert {"peak_bytes", "operators", "flops"} <= set(exact)
    assert exact == exact_without
    assert audited.status == "ok"
    assert (unaudited.status, unaudited.reasons) == (
        "invalid",
        ("The audit was switched off: what ran was not checked, so its numbers prove nothing.",),
    )
    assert set(unaudited.audit) <= _FREE < set(audited.audit) | _FREE
    assert {"audit", "equivalence"}.isdisjoint(unaudited.circumstances.phase_s)
