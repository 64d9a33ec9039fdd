"""Training by the libraries' own path and by the tuned engine: other sizes, and the report's own rows. Not part of the default suite.

    pytest --benchmark bench/train_engine.py
    pytest --benchmark bench/train_engine.py --case '*/lora-rows-*'      # an epoch of the report's 4000 rows, padded and packed

Llama-3.2-3B itself is in the suite (`hpc_core.catalogue.TUNED`); what each switch brings says `studies/ablations/train.py`.
"""

from __future__ import annotations

from hpc_core import Case, perf_cases
from hpc_core.catalogue import SWEEP
from hpc_core.plugin.fixture import Perf


@perf_cases(case for case in SWEEP if case.kind == "finetune")
def test_case(case: Case, perf: Perf) -> None:
    """The case runs as asked, and no gated metric is worse than its baseline."""
    perf(case)
