"""Whatever a worker does, it is one record that says so, no process is left, and nothing hangs."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Iterator

import psutil
import pytest

from hpc_core.case.case import Case
from hpc_core.case.workloads import CallableSpec
from hpc_core.launch.launcher import Launcher
from hpc_core.record.job import Job
from hpc_core.record.record import Record, record_to_json
from tests.launch.misbehaving import MISBEHAVIOURS

pytestmark = pytest.mark.slow

_PR_SET_CHILD_SUBREAPER = 36
_PROMPT_S = 30.0
"""What ending everything may take beyond a case's own limit, on a busy machine; a hang takes far longer."""


@pytest.fixture(autouse=True)
def adopting() -> Iterator[None]:
    """Orphans become children of this process, so that one that escapes is found."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    yield
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def below() -> set[psutil.Process]:
    """Processes below this one that run; dead orphans are reaped."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.add(process)
            elif process.ppid() == os.getpid() and "python" not in process.name():
                os.waitpid(process.pid, os.WNOHANG)
    return found


def left_since(before: set[psutil.Process]) -> set[psutil.Process]:
    """Processes that came since and stay; the kernel may need a moment for one that has closed its descriptors and is ending."""
    psutil.wait_procs(below() - before, timeout=1)
    return below() - before


def outcome(record: Record) -> str:
    return record.status if record.failure is None else record.failure.kind


_QUICK = {
    "raises_with_a_cyclic_cause",
    "raises_a_lone_surrogate",
    "raises_what_cannot_be_printed",
    "raises_fifty_megabytes",
    "closes_the_events",
    "writes_a_line_without_end_to_the_events",
    "leaves_a_child_that_forks_into_new_sessions_forever",
    "kills_its_supervisor",
    "stops_its_supervisor",
}
"""Those that once went wrong. The others run at night."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in _QUICK else pytest.mark.nightly) for name in MISBEHAVIOURS]
)
def test_a_misbehaving_worker_is_one_true_record(name: str, warm: Launcher) -> None:
    """Its kind is right, its words are there and bounded, JSON can hold it, and everything it started has ended."""
    expected = MISBEHAVIOURS[name]
    workload = CallableSpec(factory="tests.launch.misbehaving:step", arguments={"name": name}, steps=1)
    case = Case(id="own/misbehaving", scale="tiny", workload=workload, timeout_s=expected.timeout_s)
    before = below()
    began = time.monotonic()
    record = warm.run(Job(case=case, device="cpu"))
    assert time.monotonic() - began < expected.timeout_s + _PROMPT_S
    said = "" if record.failure is None else f"{record.failure.message}\n{record.failure.detail}"
    assert outcome(record) in expected.outcomes, said
    assert expected.words in said
    assert len(record_to_json(record)) < 100_000
    assert left_since(before) == set()
