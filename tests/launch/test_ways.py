"""Every way of launching gives a record, whatever the worker does. Real processes throughout."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hpc_core.case.case import CallableSpec, Case
from hpc_core.case.errors import LaunchError
from hpc_core.launch.launcher import Launcher
from hpc_core.record.job import (
    Event,
    Exited,
    Finished,
    Job,
    Phase,
    Way,
    encode_event,
)
from hpc_core.record.record import Failure, Record

pytestmark = pytest.mark.slow


def job(factory: str, *, timeout_s: float = 60.0, **arguments: Any) -> Job:
    workload = CallableSpec(factory=f"tests.launch_factories:{factory}", arguments=arguments, steps=3)
    return Job(case=Case(id="own/case", scale="tiny", workload=workload, timeout_s=timeout_s), device="cpu")


def failure(record: Record) -> Failure:
    assert record.status == "failed"
    assert record.failure is not None
    return record.failure


@pytest.fixture(scope="module")
def warm() -> Iterator[Launcher]:
    with Launcher("warm") as launcher:
        launcher.prepare()
        assert launcher.way == "warm", launcher.notes
        yield launcher


@pytest.fixture(params=["warm", "exec"])
def launcher(request: pytest.FixtureRequest) -> Launcher:
    if request.param == "exec":
        return Launcher("exec")
    chosen: Launcher = request.getfixturevalue("warm")
    return chosen


def test_a_worker_gives_the_record_of_its_case(launcher: Launcher) -> None:
    """A job's record is ok, has the job's case and says how it was launched."""
    asked = job("quiet")
    record = launcher.run(asked)
    assert (record.status, record.case, record.circumstances.launched) == ("ok", asked.case, launcher.way)


def test_inline_gives_the_record_of_its_case() -> None:
    """Inline runs the same code in this process and says so."""
    asked = job("quiet")
    record = Launcher("inline").run(asked)
    assert (record.status, record.case, record.circumstances.launched) == ("ok", asked.case, "inline")


def test_inline_records_an_error() -> None:
    """Without debug, an exception inline is a failed record as in other ways."""
    assert failure(Launcher("inline").run(job("says_then_raises", words="inline"))).kind == "error"


def test_inline_debug_raises_the_error() -> None:
    """With debug, an exception inline reaches the debugger."""
    with pytest.raises(ValueError, match="no mind to"):
        Launcher("inline", debug=True).run(job("says_then_raises", words="inline"))


def test_inline_raises_an_interrupt() -> None:
    """Ctrl-C inline is meant for the session, not for one case."""
    with pytest.raises(KeyboardInterrupt):
        Launcher("inline").run(job("interrupted"))


def test_events_arrive_in_order() -> None:
    """The listener hears import, start, the run's own phases, the record and the end, in this order."""
    heard: list[Event] = []
    Launcher("exec", on_event=lambda _, event: heard.append(event)).run(job("quiet"))
    phases = [event.name for event in heard if isinstance(event, Phase)]
    assert phases[:2] == ["import", "start"]
    assert [type(event) for event in heard[-2:]] == [Finished, Exited]


def test_an_abort_is_a_crash_with_its_signal(launcher: Launcher) -> None:
    """A worker that dies of SIGABRT is named so, and the detail shows the line."""
    seen = failure(launcher.run(job("aborts")))
    assert (seen.kind, "SIGABRT" in seen.message) == ("crash", True)
    assert "Fatal Python error: Aborted" in seen.detail


def test_sys_exit_is_a_crash_with_its_code(launcher: Launcher) -> None:
    """A case that calls sys.exit(3) fails with the code."""
    seen = failure(launcher.run(job("exits", code=3)))
    assert (seen.kind, "3" in seen.message) == ("crash", True)


def test_an_end_without_record_is_a_crash_with_output(launcher: Launcher) -> None:
    """A worker that ends behind our back fails with its exit code and its last words."""
    seen = failure(launcher.run(job("exits_at_once", code=3)))
    assert (seen.kind, "exit code 3" in seen.message, "last words" in seen.detail) == ("crash", True, True)


def test_a_foreign_sigkill_is_killed(launcher: Launcher) -> None:
    """A SIGKILL that is not ours points to the host's memory."""
    seen = failure(launcher.run(job("kills_itself")))
    assert (seen.kind, "out of memory" in seen.message) == ("killed", True)


def test_a_hang_is_a_timeout_that_says_where(launcher: Launcher) -> None:
    """A timeout names limit, phase and remedy, and its detail has the stack that hung."""
    record = launcher.run(job("hangs", timeout_s=1.5))
    seen = failure(record)
    assert (seen.kind, "1.5 s" in seen.message, "timeout_s=" in seen.message) == ("timeout", True, True)
    assert f"phase {seen.phase!r}" in seen.message
    assert "most recent call first" in seen.detail


def test_an_exception_is_an_error_with_traceback_and_output(launcher: Launcher) -> None:
    """What a factory raises is in the message, where it raised and what it printed in the detail."""
    seen = failure(launcher.run(job("says_then_raises", words="these words")))
    assert (seen.kind, "no mind to" in seen.message) == ("error", True)
    assert "launch_factories.py" in seen.detail
    assert "these words" in seen.detail


@pytest.mark.parametrize(
    ("factory", "arguments", "kind", "words"),
    [
        ("needs_package", {"name": "bitsandbytes"}, "missing_library", "pip install 'hpc-core[quantization]'"),
        ("needs_package", {"name": "of_my_own"}, "error", "of_my_own"),
        ("out_of_host_memory", {}, "out_of_memory", "512 GiB"),
        ("out_of_gpu_memory", {}, "out_of_memory", "Tried to allocate 20.00 GiB. Lower batch"),
        ("interrupted", {}, "interrupted", "again"),
    ],
)
def test_an_exception_has_the_kind_it_deserves(
    warm: Launcher, factory: str, arguments: dict[str, Any], kind: str, words: str
) -> None:
    """Missing packages, missing memory and interrupts are told apart from errors."""
    seen = failure(warm.run(job(factory, **arguments)))
    assert (seen.kind, words in seen.message) == (kind, True)


def test_output_does_not_disturb_the_protocol(warm: Launcher) -> None:
    """A worker may print anything, events included."""
    assert warm.run(job("noisy")).status == "ok"


def test_a_malformed_event_is_a_crash(warm: Launcher) -> None:
    """Once a line on the events' descriptor is no event, the record after it is not trusted."""
    seen = failure(warm.run(job("forges", line='{"event":"finished","record":{"schema":"x"}}')))
    assert (seen.kind, "is no event" in seen.message) == ("crash", True)


def test_a_record_of_another_case_is_a_crash(warm: Launcher) -> None:
    """A record must answer the case that was asked."""
    other = warm.run(job("quiet"))
    line = encode_event(Finished(msgspec.structs.replace(other, case=job("aborts").case))).decode().strip()
    seen = failure(warm.run(job("forges_and_ends", line=line)))
    assert (seen.kind, "another case" in seen.message) == ("crash", True)


def test_a_failed_record_tells_its_circumstances(warm: Launcher) -> None:
    """A crash, too, has machine, stack and way."""
    around = warm.run(job("aborts")).circumstances
    assert (around.launched, around.machine.key) == (warm.way, "cpu")


def test_jobs_do_not_share_a_process(warm: Launcher, tmp_path: Path) -> None:
    """What one case leaves in a module, the next does not see."""
    calls = []
    for _ in range(2):
        assert warm.run(job("counted", path=str(tmp_path / "facts"))).status == "ok"
        calls.append(json.loads((tmp_path / "facts").read_text())["calls"])
    assert calls == [1, 1]


@pytest.mark.parametrize("way", ["warm", "exec"])
def test_several_threads_may_run_jobs(way: Way) -> None:
    """Four threads with one launcher: each gets the record of its own case, and each worker is a process of its own."""
    jobs = [
        msgspec.structs.replace(asked := job("quiet"), case=msgspec.structs.replace(asked.case, id=f"own/{n}"))
        for n in range(8)
    ]
    with Launcher(way) as launcher, ThreadPoolExecutor(4) as pool:
        records = list(pool.map(launcher.run, jobs))
    assert [(record.status, record.case.id) for record in records] == [("ok", f"own/{n}") for n in range(8)]
    assert launcher.notes == ()


def test_a_worker_sees_the_launchers_environment_of_now(
    warm: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variable set after the warm parent started counts too."""
    monkeypatch.setenv("HPC_CORE_TEST", "now")
    warm.run(job("counted", path=str(tmp_path / "facts")))
    facts = json.loads((tmp_path / "facts").read_text())
    assert (facts["variable"], facts["folder"]) == ("now", str(Path.cwd()))


def test_extra_environment_reaches_the_worker_only(tmp_path: Path) -> None:
    """`environment=` is the worker's, not this process's."""
    Launcher("exec", environment={"HPC_CORE_TEST": "extra"}).run(job("counted", path=str(tmp_path / "facts")))
    variable = json.loads((tmp_path / "facts").read_text())["variable"]
    assert (variable, os.environ.get("HPC_CORE_TEST")) == ("extra", None)


def test_the_warm_parent_leaves_cuda_alone(warm: Launcher) -> None:
    """It has torch and transformers, and neither peft, bitsandbytes nor a CUDA context."""
    said = warm.preloaded
    assert said is not None
    assert {"torch", "transformers"} <= set(said.modules)
    assert not {"peft", "bitsandbytes"} & set(said.modules)
    assert not said.cuda_initialized


def test_the_launcher_needs_no_torch() -> None:
    """A process that launches warm jobs has not imported torch itself."""
    script = (
        "import sys, hpc_core.launch.launcher; print('torch' in sys.modules, 'hpc_core.worker.main' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["False", "False"]


def test_descriptors_do_not_leak(warm: Launcher) -> None:
    """Twenty jobs leave launcher and warm parent with the descriptors they had."""
    assert warm.preloaded is not None
    folders = [Path(f"/proc/{pid}/fd") for pid in (os.getpid(), warm.preloaded.pid)]
    warm.run(job("quiet"))
    before = [len(list(folder.iterdir())) for folder in folders]
    for _ in range(20):
        warm.run(job("quiet"))
    assert [len(list(folder.iterdir())) for folder in folders] == before


def test_programs_do_not_inherit_the_events(warm: Launcher, tmp_path: Path) -> None:
    """A program that a case starts cannot hold the launcher's line open, even if it closes nothing."""
    assert warm.run(job("lists_inherited_pipes", path=str(tmp_path / "pipes"))).status == "ok"
    assert (tmp_path / "pipes").read_text() == "[]\n"


def test_a_failed_preload_falls_back_and_says_so(tmp_path: Path) -> None:
    """Where transformers cannot be imported, jobs run by exec, and launcher and record tell why."""
    (tmp_path / "transformers.py").write_text("raise ImportError('this transformers is broken')\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    with Launcher("warm", environment={"PYTHONPATH": path}) as launcher:
        record = launcher.run(job("quiet"))
    assert (launcher.way, record.circumstances.launched) == ("exec", "exec")
    assert "this transformers is broken" in launcher.notes[0]
    assert launcher.notes[0] in record.circumstances.notes


def test_a_preload_over_its_limit_falls_back() -> None:
    """A preload has a limit of its own, in seconds."""
    with Launcher("warm", preload_limit_s=0.05) as launcher:
        launcher.prepare()
    assert (launcher.way, "0.05 s" in launcher.notes[0]) == ("exec", True)


def test_a_lost_warm_parent_is_replaced_by_exec() -> None:
    """If the parent is gone between two jobs, the next one runs by exec with a note."""
    with Launcher("warm") as launcher:
        launcher.prepare()
        assert launcher.preloaded is not None
        os.kill(launcher.preloaded.pid, signal.SIGKILL)
        os.waitid(os.P_PID, launcher.preloaded.pid, os.WEXITED | os.WNOWAIT)
        record = launcher.run(job("quiet"))
    assert (record.status, record.circumstances.launched) == ("ok", "exec")
    assert "has ended" in record.circumstances.notes[0]


def test_a_missing_interpreter_is_a_launch_error() -> None:
    """No interpreter, no worker, no record."""
    with pytest.raises(LaunchError, match="no program that can be run"):
        Launcher("exec", python="/nowhere/python").run(job("quiet"))


def test_a_cold_worker_runs_in_the_folder_it_is_given(tmp_path: Path) -> None:
    """The worker's working directory is the launcher's `folder`; the supervisor's code stays the launcher's."""
    folder = tmp_path / "tree"
    folder.mkdir()
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\npwd > {tmp_path / 'seen'}\n")
    python.chmod(0o755)
    record = Launcher("exec", python=python, folder=folder).run(job("quiet"))
    assert failure(record).kind == "crash"  # this interpreter gives no record
    assert (tmp_path / "seen").read_text().strip() == str(folder)
