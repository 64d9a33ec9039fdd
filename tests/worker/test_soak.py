"""The soak: two hundred steps over real, varying lengths, in flat memory."""

from __future__ import annotations

import pytest

from hpc_core.catalogue import catalogue
from hpc_core.launch.launcher import Launcher
from hpc_core.record.job import Job

pytestmark = pytest.mark.nightly


def test_memory_of_the_soak_is_flat_unless_it_leaks() -> None:
    """Memory stays flat over two hundred steps of different widths; with 4 MB leaked per step the record is INVALID."""
    case = catalogue()["tiny/lora-soak"]
    with Launcher("warm") as launcher:
        clean = launcher.run(Job(case=case))
        leaking = launcher.run(Job(case=case, fault="growing-memory"))

    assert (clean.status, clean.audit["memory_growth"].seen) == ("ok", "flat")
    assert clean.metrics["compilations"].value == 0
    assert len(clean.metrics["step_s"].samples or ()) == 200
    assert leaking.status == "invalid"
    assert any(reason.startswith("memory_growth: asked for 'flat', saw '+") for reason in leaking.reasons)
