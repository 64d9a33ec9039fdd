"""Faults that a prediction alone catches: judged by a clean prediction of the same session, nothing runs."""

from __future__ import annotations

import html
from pathlib import Path

import pytest

from hpc_core.baselines.accept import accept
from hpc_core.cli.fault_causes import explained
from hpc_core.cli.fault_trials import run_trials, trial_cases
from hpc_core.faults.catalogue import FAULTS
from hpc_core.record.job import Job, Predict
from hpc_core.record.record import Record
from hpc_core.report.entry import entries_of
from hpc_core.report.markdown import markdown, safe
from hpc_core.report.page import page
from hpc_core.report.terminal import render
from tests.predict.predicting import GPU, predicted_jobs

SEEN = {name: fault for name, fault in FAULTS.items() if fault.predicted}


def test_many_faults_are_seen_without_a_gpu() -> None:
    """At least ten of them by bytes; those that change values or times alone are none of them."""
    in_bytes = [name for name, fault in SEEN.items() if any(metric.endswith("_bytes") for metric in fault.predicted)]
    assert len(in_bytes) >= 10
    assert not set(SEEN) & {"decode-sleep", "attention-scaled", "weights-shuffled", "loss-scaled", "foreign-forward"}


@pytest.mark.slow
def test_a_predicted_fault_is_caught_and_its_twin_is_not() -> None:
    """One of them on a tiny case; `hpc-core faults --predicted` tries all at full width."""
    told: list[str] = []
    cases = trial_cases("tiny")
    (trial,) = run_trials(["rank-16"], cases=cases, tell=told.append, against="clean", jobs=2, predict=GPU)
    assert (trial.outcome, trial.twin) == ("caught", "PASS")
    assert "trainable_parameters" in trial.caught_by
    assert len(told) == 1


@pytest.fixture(scope="module")
def recomputed_and_not() -> tuple[Record, Record]:
    """A case with checkpointing as predicted, and with checkpointing that is silently off."""
    case = trial_cases("tiny")["lora-gc"]
    before, now = predicted_jobs(
        [Job(case=case, kind=Predict(gpu=GPU)), Job(case=case, kind=Predict(gpu=GPU), fault="gc-off")]
    )
    return before, now


@pytest.mark.slow
def test_the_cause_of_a_predicted_fault_names_category_and_module(recomputed_and_not: tuple[Record, Record]) -> None:
    """Checkpointing that is silently off is named by a prediction alone: activations of the attention, no longer recomputed."""
    found = explained("gc-off", *recomputed_and_not)

    assert found.cause is not None
    said = " ".join((*found.cause.lines, *found.cause.details))
    assert "forwards of LlamaAttention (model.layers.*.self_attn) 6 → 3: no longer recomputed" in found.cause.lines[0]
    assert "activations +1.22 MiB in LlamaAttention (layers.*.self_attn, 3 layers)" in said
    assert "weights, adapter, optimizer as before" in said


@pytest.mark.slow
def test_a_report_of_a_fault_says_why(recomputed_and_not: tuple[Record, Record], tmp_path: Path) -> None:
    """From the record and the baseline alone, page, Markdown, table and JSON say in the same two lines what explain says."""
    before, now = recomputed_and_not
    accept(tmp_path / "baselines", before, reason="with checkpointing", allow_dirty=True)
    (entry,) = entries_of([now], tmp_path / "baselines")

    assert entry.cause is not None
    first, second = entry.cause.lines
    assert "no longer recomputed" in first
    shown = html.unescape(page([entry]))
    for line in (first, second):
        assert shown.count(f"<p>{line}</p>") == 1
        assert f"**Why:** {safe(line, 1500)}" in markdown([entry])
        assert f"Why: {line}" in " ".join(render([entry.row], width=2000, color=False).split("\n    "))
    assert all(f"<li>{detail}</li>" in shown for detail in entry.cause.details)
    assert len(entry.cause.details) > 3
