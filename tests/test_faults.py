"""The catalogue of injected faults, and the trying of them. All of it is tried by `hpc-core faults`; here, how it works."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc_core.cases import catalogue
from hpc_core.cli.faults import Trial, markdown, run_trials, table
from hpc_core.errors import SpecError
from hpc_core.faults import FAULTS, inject
from hpc_core.gate import Verdict, judge
from hpc_core.launch.launcher import Launcher
from hpc_core.launch.protocol import Job
from hpc_core.store import find

pytestmark = pytest.mark.slow
BASELINES = Path(__file__).parent.parent / "baselines"


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    """One warm parent for all."""
    with Launcher("warm") as warm:
        yield warm


def test_the_catalogue_is_complete_enough() -> None:
    """There are at least 24 faults, and each is tried on a case that exists at both scales or on a tiny one at least."""
    assert len(FAULTS) >= 24
    assert {f"tiny/{fault.variant}" for fault in FAULTS.values()} <= set(catalogue())


def test_an_unknown_fault_names_the_known_ones() -> None:
    """A typo is answered with the list."""
    with pytest.raises(SpecError, match=r"No fault is called 'gc-of'(.|\n)*gc-off"):
        inject("gc-of")


def test_a_fault_is_caught_by_name_and_its_twin_passes(launcher: Launcher) -> None:
    """One fault of each kind turns red what it names: a fact of the audit, a count, a peak."""
    told: list[str] = []
    names = ["compute-dtype-fp32", "extra-kernel", "logits-kept"]

    trials = run_trials(names, scale="tiny", baselines=BASELINES, tell=told.append, launcher=launcher)

    assert [trial.caught_by[0] for trial in trials] == ["compute_dtype", "operators", "peak_bytes"]
    assert all(trial.twin == "PASS" for trial in trials)
    assert [line.split()[:2] for line in told] == [["caught", name] for name in names]


def test_a_fault_does_not_leak_into_the_next_case(launcher: Launcher) -> None:
    """After a patched case, the same case without the patch passes in the same session."""
    case = catalogue()["tiny/lora"]
    launcher.run(Job(case=case, fault="extra-kernel"))

    clean = launcher.run(Job(case=case))

    assert judge(clean, find(BASELINES, "cpu", case.id)).verdict is Verdict.PASS


def test_a_fault_that_never_runs_proves_nothing(launcher: Launcher) -> None:
    """A case that does not reach the patched code is INVALID, and says so."""
    record = launcher.run(Job(case=catalogue()["tiny/generate-bf16"], fault="gc-off"))

    assert record.status == "invalid"
    assert "proves nothing here" in record.reasons[-1]


def test_missed_faults_and_false_alarms_are_said() -> None:
    """The summary names what was missed; the table shows it."""
    fault = FAULTS["rank-16"]
    caught = Trial(
        fault=fault, case="tiny/lora", red=("trainable_parameters",), verdict="INVALID", twin="PASS", seconds=2
    )
    passed = Trial(fault=FAULTS["gc-on"], case="tiny/lora", red=(), verdict="PASS", twin="PASS", seconds=2)
    alarm = Trial(
        fault=fault, case="tiny/lora", red=("trainable_parameters",), verdict="INVALID", twin="REGRESSED: x", seconds=1
    )

    assert table([caught]) == "1 of 1 faults caught, twins green, 2 s"
    assert table([caught, passed, alarm]).endswith("MISSED: gc-on, rank-16")
    assert "**missed**" in markdown([passed])
