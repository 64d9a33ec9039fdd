"""Faults that a prediction alone catches: a clean prediction of the same session judges them, and nothing runs."""

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

PREDICTED = {name: fault for name, fault in FAULTS.items() if fault.predicted}


def test_at_least_ten_faults_show_in_predicted_bytes() -> None:
    """At least ten faults change predicted bytes; faults that change only values or times are not listed as predicted."""
    change_bytes = [
        name for name, fault in PREDICTED.items() if any(metric.endswith("_bytes") for metric in fault.predicted)
    ]
    assert len(change_bytes) >= 10
    assert not set(PREDICTED) & {
        "decode-sleep",
        "attention-scaled",
        "weights-shuffled",
        "loss-scaled",
        "foreign-forward",
    }


@pytest.mark.slow
def test_a_predicted_fault_is_caught_and_its_no_op_passes() -> None:
    """Prediction catches a fault on a tiny case and passes the fault's no-op. `hpc-core faults --predicted` tries all at full width."""
    lines: list[str] = []
    cases = trial_cases("tiny")
    (trial,) = run_trials(["rank-16"], cases=cases, tell=lines.append, against="clean", jobs=2, predict=GPU)
    assert (trial.outcome, trial.twin) == ("caught", "PASS")
    assert "trainable_parameters" in trial.caught_by
    assert len(lines) == 1


@pytest.fixture(scope="module")
def with_and_without_checkpointing() -> tuple[Record, Record]:
    """The prediction of a case with checkpointing, and with checkpointing silently off."""
    case = trial_cases("tiny")["lora-gc"]
    before, now = predicted_jobs(
        [Job(case=case, kind=Predict(gpu=GPU)), Job(case=case, kind=Predict(gpu=GPU), fault="gc-off")]
    )
    return before, now


@pytest.mark.slow
def test_the_cause_of_a_predicted_fault_names_category_and_module(
    with_and_without_checkpointing: tuple[Record, Record],
) -> None:
    """The cause of silently disabled checkpointing names the category and the module of the added bytes."""
    cause = explained("gc-off", *with_and_without_checkpointing).cause
    assert cause is not None
    text = " ".join((*cause.lines, *cause.details))
    assert "forwards of LlamaAttention (model.layers.*.self_attn) 6 → 3: no longer recomputed" in cause.lines[0]
    assert "activations +1.22 MiB in LlamaAttention (layers.*.self_attn, 3 layers)" in text
    assert "weights, adapter, optimizer as before" in text


@pytest.mark.slow
def test_every_report_shows_the_cause(with_and_without_checkpointing: tuple[Record, Record], tmp_path: Path) -> None:
    """Page, Markdown and terminal show the cause in the same two lines, from the record and the baseline alone."""
    before, now = with_and_without_checkpointing
    accept(tmp_path / "baselines", before, reason="with checkpointing", allow_dirty=True)
    (entry,) = entries_of([now], tmp_path / "baselines")

    assert entry.cause is not None
    first, second = entry.cause.lines
    assert "no longer recomputed" in first
    html_text = html.unescape(page([entry]))
    for line in (first, second):
        assert html_text.count(f"<p>{line}</p>") == 1
        assert f"**Why:** {safe(line, 1500)}" in markdown([entry])
        assert f"Why: {line}" in " ".join(render([entry.row], width=2000, color=False).split("\n    "))
    assert all(f"<li>{detail}</li>" in html_text for detail in entry.cause.details)
    assert len(entry.cause.details) > 3
