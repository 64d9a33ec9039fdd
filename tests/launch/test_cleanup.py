"""However a run ends, none of its processes survives: children, children with their own sessions, their orphans."""

from __future__ import annotations

import contextlib
import os
import random
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
_ROLES = ("reaper", "supervisor", "worker")
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


def test_a_worker_does_not_survive_its_supervisors(warm: Launcher, listening: Listening) -> None:
    """If reaper and supervisor are both killed, the kernel ends the worker, and the record says that nobody reported its end."""
    workers: list[psutil.Process] = []
    assert warm.preloaded is not None
    forkserver = psutil.Process(warm.preloaded.pid)

    def kill_both(_: Case, event: Event) -> None:
        if event == Phase("start"):
            (reaper,) = (child for child in forkserver.children() if child.children())
            (supervisor,) = reaper.children()
            workers.extend(supervisor.children())
            reaper.kill()
            supervisor.kill()

    listening.listener = kill_both
    record = warm.run(hanging(timeout_s=20))
    assert record.failure is not None
    assert (record.failure.kind, "without a report" in record.failure.message) == ("crash", True)
    assert wait_for(lambda: not workers[0].is_running(), _GONE_S)


def hanging(timeout_s: float) -> Job:
    workload = CallableSpec(factory="tests.launch.launch_factories:hangs", steps=1)
    return Job(case=Case(id="own/hangs", scale="tiny", workload=workload, timeout_s=timeout_s), device="cpu")


@pytest.mark.nightly
def test_stopped_supervisors_are_ended_by_the_launcher(
    warm: Launcher, listening: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If reaper and supervisor are both stopped, the launcher waits for their limit, then ends them and the worker itself."""
    assert warm.preloaded is not None
    forkserver = psutil.Process(warm.preloaded.pid)
    family: list[psutil.Process] = []

    def stop_both(_: Case, event: Event) -> None:
        if event == Phase("start"):
            (reaper,) = (child for child in forkserver.children() if child.children())
            family.extend([reaper, *reaper.children(recursive=True)])
            reaper.suspend()
            family[1].suspend()

    monkeypatch.setattr("hpc_core.launch.channel._END_LIMIT_S", 2.0)
    listening.listener = stop_both
    record = warm.run(hanging(timeout_s=1))
    assert record.failure is not None
    assert (record.failure.kind, len(family)) == ("timeout", 3)
    assert psutil.wait_procs(family, timeout=_GONE_S)[1] == []


@pytest.mark.nightly
@pytest.mark.parametrize("number", range(20))
def test_nothing_survives_a_kill_at_a_random_moment(number: int, marker: str, warm: Launcher) -> None:
    """Whether worker, supervisor, reaper or launcher is killed, and whenever: there is one record, and no process is left."""
    moment = random.Random(number)
    victim = (*_ROLES, "launcher")[number % 4]
    if victim == "launcher":
        with launching("exec", marker) as launcher:
            time.sleep(moment.uniform(0, 0.5))
            launcher.kill()
        assert wait_for(lambda: not processes(marker), _GONE_S)
        return
    assert warm.preloaded is not None
    forkserver = psutil.Process(warm.preloaded.pid)

    def running() -> dict[str, psutil.Process]:
        reapers = forkserver.children()
        supervisors = [child for reaper in reapers for child in reaper.children()]
        workers = [child for supervisor in supervisors for child in supervisor.children()]
        return {name: each[0] for name, each in zip(_ROLES, (reapers, supervisors, workers), strict=True) if each}

    hang = moment.random() < 0.5
    with ThreadPoolExecutor() as pool:
        run = pool.submit(warm.run, job(marker, hang=hang, timeout_s=4))
        with contextlib.suppress(psutil.NoSuchProcess, KeyError):  # it was faster
            wait_for(lambda: victim in running() or run.done())
            time.sleep(moment.uniform(0, 1))
            running()[victim].kill()
        record = run.result()
    outcome = record.status if record.failure is None else record.failure.kind
    uninterrupted = "timeout" if hang else "ok"
    assert outcome in ({uninterrupted} if victim == "reaper" else {"killed", uninterrupted}), record.failure
    assert processes(marker) == []
    assert wait_for(lambda: not forkserver.children(), 1)
