"""Judging: values to verdicts. Pure: reads no file, launches nothing, imports no torch."""

from __future__ import annotations

from hpc_core.gate.judge import judge
from hpc_core.gate.pull_request import Side, judge_pull_request
from hpc_core.gate.regime import sessions_of_level
from hpc_core.gate.verdict import Excuse, Judgement, MetricVerdict, Outcome, Verdict
from hpc_core.gate.waiver import Waiver, expired, waived, waivers_from_toml

__all__ = [
    "Excuse",
    "Judgement",
    "MetricVerdict",
    "Outcome",
    "Side",
    "Verdict",
    "Waiver",
    "expired",
    "judge",
    "judge_pull_request",
    "sessions_of_level",
    "waived",
    "waivers_from_toml",
]
