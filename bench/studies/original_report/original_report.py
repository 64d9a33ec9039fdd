"""The original report's three artefacts, run and judged in one session. Not part of the default suite: some five minutes on an H100.

    pytest --benchmark bench/studies/original_report/original_report.py

Each case is judged against its baseline as ever; then the three artefacts are judged by physics from this session's own records
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
    """What this session measured can be, and shows what it is to show: its table stands at the end of the run."""
    found = artefacts(perf_session.records)[number]
    if found.missing:
        pytest.skip(f"no sound record in this session of {', '.join(found.missing)}")
    perf_session.show(found.title, found.text)
    assert not found.refused, "\n".join(found.refused)
