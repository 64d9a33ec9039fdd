"""However a run ends, none of its processes survives: children, children with their own sessions, their orphans."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import msgspec
import psutil
import pytest

from hpc_core.case.case import Case
from hpc_core.case.workloads import CallableSpec
from hpc_core.launch.launcher import Launcher
from hpc_core.record.job import Event, Job, Phase
from tests.launch.conftest import Listening

pytestmark = pytest.mark.slow

_CHILDREN = 3
_GONE_S = 15.0
"""Milliseconds on an idle machine; a busy one may take longer."""

_LAUNCH = """
import sys, msgspec
from hpc_core.launch.launcher import Launcher
from hpc_core.record.job import Job
with Launcher(sys.argv[1]) as launcher:
    launcher.run(msgspec.json.decode(sys.argv[2], type=Job))
"""


def processes(marker: str) -> list[int]:
    """The ids of processes with the marker as an argument: those that the worker started."""
    return [each.pid for each in psutil.process_iter(["cmdline"]) if marker in (each.info["cmdline"] or ())]


def wait_for(condition: Callable[[], bool], limit_s: float = 30.0) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.fixture
def marker() -> Iterator[str]:
    """An argument that no other process has. Processes that still have it after the test are killed."""
    name = f"hpc-core-test-{uuid.uuid4().hex}"
    yield name
    for pid in processes(name):
        os.kill(pid, signal.SIGKILL)


def job(marker: str, *, hang: bool, timeout_s: float = 60.0) -> Job:
    factory = "tests.launch.launch_factories:leaves_children"
    workload = CallableSpec(factory=factory, arguments={"marker": marker, "hang": hang}, steps=1)
    return Job(case=Case(id="own/family", scale="tiny", workload=workload, timeout_s=timeout_s), device="cpu")


def test_nothing_survives_a_timeout(marker: str, warm: Launcher) -> None:
    """The worker's descendants are gone when the run returns."""
    with ThreadPoolExecutor() as pool:
        had_started = pool.submit(wait_for, lambda: len(processes(marker)) == _CHILDREN)
        record = warm.run(job(marker, hang=True, timeout_s=3))
    assert record.failure is not None
    assert (record.failure.kind, had_started.result(), processes(marker)) == ("timeout", True, [])


def test_nothing_survives_a_good_run(marker: str, warm: Launcher) -> None:
    """Children that a case leaves behind are ended, and the record counts them."""
    record = warm.run(job(marker, hang=False))
    assert (record.status, processes(marker)) == ("ok", [])
    assert any(f"{_CHILDREN} processes" in note for note in record.circumstances.notes)


def test_a_listener_that_raises_ends_the_worker(marker: str, warm: Launcher, listening: Listening) -> None:
    """An error in the launcher's listener leaves no process."""

    def refuse(_: Case, event: Event) -> None:
        if isinstance(event, Phase) and len(processes(marker)) == _CHILDREN:
            raise RuntimeError("enough")

    listening.listener = refuse
    with pytest.raises(RuntimeError, match="enough"):
        warm.run(job(marker, hang=True, timeout_s=20))
    assert processes(marker) == []


def test_nothing_survives_ctrl_c(marker: str) -> None:
    """An interrupted launcher waits until its worker has ended."""
    with launching("exec", marker) as launcher:
        launcher.send_signal(signal.SIGINT)
        _, printed = launcher.communicate(timeout=_GONE_S)
        assert ("KeyboardInterrupt" in printed, processes(marker)) == (True, [])


def test_nothing_survives_a_launcher_that_is_killed(marker: str) -> None:
    """The forkserver and its workers end with a launcher that is killed by SIGKILL."""
    with launching("warm", marker) as launcher:
        (forkserver,) = psutil.Process(launcher.pid).children()
        assert "hpc_core.launch.forkserver" in forkserver.cmdline()
        launcher.kill()
    assert wait_for(lambda: not processes(marker) and not forkserver.is_running(), _GONE_S)


def launching(way: str, marker: str) -> subprocess.Popen[str]:
    """A launcher in its own process, whose worker hangs and has started its children."""
    command = [sys.executable, "-c", _LAUNCH, way, msgspec.json.encode(job(marker, hang=True)).decode()]
    launcher = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert wait_for(lambda: len(processes(marker)) == _CHILDREN, 60)
    return launcher


def test_a_worker_does_not_survive_its_supervisor(warm: Launcher, listening: Listening) -> None:
    """If the supervisor is killed, the kernel ends the worker, and the record says that neither reported."""
    workers: list[psutil.Process] = []
    assert warm.preloaded is not None
    forkserver = psutil.Process(warm.preloaded.pid)

    def kill_supervisor(_: Case, event: Event) -> None:
        if event == Phase("start"):
            (supervisor,) = (child for child in forkserver.children() if child.children())
            workers.extend(supervisor.children())
            supervisor.kill()

    workload = CallableSpec(factory="tests.launch.launch_factories:hangs", steps=1)
    hanging = Job(case=Case(id="own/hangs", scale="tiny", workload=workload, timeout_s=20), device="cpu")
    listening.listener = kill_supervisor
    record = warm.run(hanging)
    assert record.failure is not None
    assert (record.failure.kind, "without a report" in record.failure.message) == ("crash", True)
    assert wait_for(lambda: not workers[0].is_running(), _GONE_S)
