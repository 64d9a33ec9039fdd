"""Measure generation with int4 weights by transformers and by the graph engine. Not part of the default suite: it needs torchao (extra `int4`).

    pytest --benchmark bench/int4.py

`bench/decode_engine.py` measures the same model in NF4 and bfloat16.
"""

from __future__ import annotations

from hpc_core import Case, perf_cases
from hpc_core.catalogue import INT4
from hpc_core.plugin.fixture import Perf


@perf_cases(INT4)
def test_case(case: Case, perf: Perf) -> None:
    """The case runs as asked, and no gated metric is worse than its baseline."""
    perf(case)
