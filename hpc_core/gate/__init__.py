"""Judging: values to verdicts. Pure: reads no file, launches nothing, imports no torch."""

from __future__ import annotations

from hpc_core.gate.judge import judge
from hpc_core.gate.verdict import Judgement, MetricVerdict, Outcome, Verdict

__all__ = ["Judgement", "MetricVerdict", "Outcome", "Verdict", "judge"]
