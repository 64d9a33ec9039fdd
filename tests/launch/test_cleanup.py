"""However a run ends, nothing it started survives: children, children with sessions of their own, orphans of those."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from hpc_core.case.case import CallableSpec, Case
from hpc_core.launch.launcher import Launcher
from hpc_core.record.job import Job, Phase

pytestmark = pytest.mark.slow

_CHILDREN = 3
_GONE_S = 15.0
"""Milliseconds on an idle machine; a busy one may take its time."""

_LAUNCH = """
import sys, msgspec
from hpc_core.launch.launcher import Launcher
from hpc_core.record.job import Job
with Launcher("exec") as launcher:
    launcher.run(msgspec.json.decode(sys.argv[1], type=Job))
"""


def processes(marker: str) -> list[int]:
    """Process ids that have the marker as an argument of its own: what the worker started, and nothing else."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            arguments = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if marker.encode() in arguments:
            found.append(int(entry.name))
    return found


def wait_for(condition: Callable[[], bool], limit_s: float = 30.0) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.fixture
def marker() -> Iterator[str]:
    """An argument that no other process has; what still has it after the test is ended."""
    name = f"hpc-core-test-{uuid.uuid4().hex}"
    yield name
    for pid in processes(name):
        os.kill(pid, signal.SIGKILL)


def job(marker: str, *, hang: bool, timeout_s: float = 60.0) -> Job:
    factory = "tests.launch_factories:leaves_children"
    workload = CallableSpec(factory=factory, arguments={"marker": marker, "hang": hang}, steps=1)
    return Job(case=Case(id="own/family", scale="tiny", workload=workload, timeout_s=timeout_s), device="cpu")


def test_nothing_survives_a_timeout(marker: str) -> None:
    """When the run returns, the worker's descendants are gone."""
    with ThreadPoolExecutor() as pool:
        were_there = pool.submit(wait_for, lambda: len(processes(marker)) == _CHILDREN)
        record = Launcher("exec").run(job(marker, hang=True, timeout_s=3))
    assert record.failure is not None
    assert (record.failure.kind, were_there.result(), processes(marker)) == ("timeout", True, [])


def test_nothing_survives_a_good_run(marker: str) -> None:
    """Children that a case leaves behind are ended, and the record says how many."""
    record = Launcher("exec").run(job(marker, hang=False))
    assert (record.status, processes(marker)) == ("ok", [])
    assert any(f"{_CHILDREN} processes" in note for note in record.circumstances.notes)


def test_a_listener_that_raises_ends_the_worker(marker: str) -> None:
    """An error of the launcher's own leaves no process either."""

    def refuse(_: Case, event: object) -> None:
        if isinstance(event, Phase) and len(processes(marker)) == _CHILDREN:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        Launcher("exec", on_event=refuse).run(job(marker, hang=True, timeout_s=20))
    assert processes(marker) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_nothing_survives_a_launcher_that_is_ended(marker: str, number: signal.Signals) -> None:
    """Ctrl-C, SIGTERM and SIGKILL of the launcher leave no process."""
    command = [sys.executable, "-c", _LAUNCH, msgspec.json.encode(job(marker, hang=True)).decode()]
    launcher = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert wait_for(lambda: len(processes(marker)) == _CHILDREN)
    launcher.send_signal(number)
    _, said = launcher.communicate(timeout=_GONE_S)
    if number == signal.SIGINT:
        assert "KeyboardInterrupt" in said
        assert processes(marker) == []  # the launcher waited for it
    else:
        assert launcher.returncode == -number
    assert wait_for(lambda: not processes(marker), _GONE_S)


def test_nothing_survives_a_warm_launcher_that_is_killed(marker: str) -> None:
    """The warm parent and its workers end with a launcher that gets SIGKILL."""
    script = _LAUNCH.replace('"exec"', '"warm"')
    command = [sys.executable, "-c", script, msgspec.json.encode(job(marker, hang=True)).decode()]
    launcher = subprocess.Popen(command)
    assert wait_for(lambda: len(processes(marker)) == _CHILDREN, 60)
    parent = next(pid for pid in _children(launcher.pid) if b"hpc_core.launch.forkserver" in _command(pid))
    launcher.kill()
    launcher.wait()
    assert wait_for(lambda: not processes(marker) and b"zygote" not in _command(parent), _GONE_S)


def test_a_worker_does_not_survive_its_supervisor() -> None:
    """If the supervisor itself is killed, the kernel ends the worker, and the record says that neither said a word."""
    workers: list[int] = []

    def kill_supervisor(_: Case, event: object) -> None:
        if event == Phase("start"):
            supervisor = next(pid for pid in _children(os.getpid()) if b"hpc_core.launch.supervisor" in _command(pid))
            workers.extend(_children(supervisor))
            os.kill(supervisor, signal.SIGKILL)

    workload = CallableSpec(factory="tests.launch_factories:hangs", steps=1)
    hanging = Job(case=Case(id="own/hangs", scale="tiny", workload=workload, timeout_s=20), device="cpu")
    record = Launcher("exec", on_event=kill_supervisor).run(hanging)
    assert record.failure is not None
    assert (record.failure.kind, "without a word" in record.failure.message) == ("crash", True)
    assert wait_for(lambda: b"hpc_core.worker" not in _command(workers[0]), _GONE_S)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
