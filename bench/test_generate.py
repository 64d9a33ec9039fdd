"""Generation: every built-in case, one test each. `--perf-scale` and `--case` choose among them."""

from __future__ import annotations

from hpc_core import Case, perf_cases
from hpc_core.catalogue import ALL, ON_REQUEST
from hpc_core.plugin.fixture import Perf


@perf_cases((case for case in ALL if case.kind == "generate"), on_request=ON_REQUEST)
def test_generate(case: Case, perf: Perf) -> None:
    """The case runs as asked, and no gated metric is worse than its baseline."""
    perf(case)
