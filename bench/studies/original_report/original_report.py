"""Run and check the original report's three artefacts in one session. Not part of the default suite: about five minutes on an H100.

    pytest --benchmark bench/studies/original_report/original_report.py

Each case is judged against its baseline as usual. The three artefacts are then checked against bounds with this session's records,
and printed below the table.
"""

from __future__ import annotations

import pytest

from bench.studies.original_report.artefacts import NEEDED, artefacts
from hpc_core import Case, perf_cases
from hpc_core.catalogue import DEVICE_BOUND, FULL
from hpc_core.plugin.fixture import Perf, PerfSession


@perf_cases(case for case in (*FULL, *DEVICE_BOUND) if case.id.rpartition("/")[2] in NEEDED)
def test_case(case: Case, perf: Perf) -> None:
    """The case runs as asked, and no gated metric is worse than its baseline."""
    perf(case)


@pytest.mark.perf_gpu
@pytest.mark.parametrize(
    "number", [pytest.param(0, id="full-lora"), pytest.param(1, id="qlora"), pytest.param(2, id="int4")]
)
def test_artefact(number: int, perf_session: PerfSession) -> None:
    """Records of the session are possible and show the artefact; its table is printed at the end of the run."""
    found = artefacts(perf_session.records)[number]
    if found.missing:
        pytest.skip(f"no sound record in this session of {', '.join(found.missing)}")
    perf_session.show(found.title, found.text)
    assert not found.refused, "\n".join(found.refused)
