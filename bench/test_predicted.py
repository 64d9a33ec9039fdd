"""GPU memory, FLOPs and kernel counts of the full-size cases without a GPU. `--perf-predict all` takes every case."""

from __future__ import annotations

from hpc_core import Case, predicted_cases
from hpc_core.catalogue.predicted import PREDICTED
from hpc_core.plugin.fixture import Perf

SHORT = ("llama-3.2-3b/lora-gc", "llama-3.2-3b/qlora", "llama-3.2-3b/generate-bf16")


@predicted_cases(PREDICTED, short=SHORT)
def test_predicted(case: Case, perf: Perf) -> None:
    """No gated metric of the prediction is worse than its baseline."""
    perf(case)
