"""Every way of launching gives a record, whatever the worker does. All processes are real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hpc_core.case.case import Case
from hpc_core.case.errors import LaunchError
from hpc_core.case.workloads import CallableSpec
from hpc_core.launch.launcher import Launcher
from hpc_core.record.job import Event, Exited, Finished, Job, Phase, Way, encode_event
from hpc_core.record.record import Failure, Record

pytestmark = pytest.mark.slow


def job(factory: str, *, timeout_s: float = 60.0, **arguments: Any) -> Job:
    workload = CallableSpec(factory=f"tests.launch.launch_factories:{factory}", arguments=arguments, steps=3)
    return Job(case=Case(id="own/case", scale="tiny", workload=workload, timeout_s=timeout_s), device="cpu")


def failure(record: Record) -> Failure:
    assert record.status == "failed"
    assert record.failure is not None
    return record.failure


@pytest.fixture
def fake_python(tmp_path: Path) -> Callable[[str], Path]:
    """Make an "interpreter": a script that is started like a forkserver or a worker, without its start-up time."""

    def make(script: str) -> Path:
        path = tmp_path / "python"
        path.write_text(f"#!{sys.executable} -S\nimport os, sys, time\n{script}\n")
        path.chmod(0o755)
        return path

    return make


def test_a_forked_worker_gives_the_record_of_its_case(
    warm: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record says how it was launched; it shares nothing with the worker before, and has the current environment."""
    facts = tmp_path / "facts"
    monkeypatch.setenv("HPC_CORE_TEST", "now")
    for _ in range(2):
        requested = job("counted", path=str(facts))
        record = warm.run(requested)
        assert (record.status, record.case, record.circumstances.launched) == ("ok", requested.case, "warm")
        assert json.loads(facts.read_text()) == {"calls": 1, "variable": "now", "folder": str(Path.cwd())}


def test_a_fresh_worker_gives_the_record_of_its_case(tmp_path: Path) -> None:
    """It runs in the given folder with the given environment, and its events come in order."""
    events: list[Event] = []
    (tmp_path / "tests").symlink_to(Path(__file__).parents[1])
    requested = job("counted", path="facts")
    launcher = Launcher(
        "exec", environment={"HPC_CORE_TEST": "extra"}, folder=tmp_path, on_event=lambda _, event: events.append(event)
    )
    record = launcher.run(requested)
    assert (record.status, record.case, record.circumstances.launched) == ("ok", requested.case, "exec")
    facts = json.loads((tmp_path / "facts").read_text())
    assert facts == {"calls": 1, "variable": "extra", "folder": str(tmp_path)}
    assert "HPC_CORE_TEST" not in os.environ
    assert [event.name for event in events if isinstance(event, Phase)][:2] == ["import", "start"]
    assert [type(event) for event in events[-2:]] == [Finished, Exited]


def test_inline_runs_in_this_process() -> None:
    """An exception is a failed record, or reaches the debugger; Ctrl-C ends the whole session."""
    requested = job("quiet")
    record = Launcher("inline").run(requested)
    assert (record.status, record.case, record.circumstances.launched) == ("ok", requested.case, "inline")
    assert failure(Launcher("inline").run(job("says_then_raises", words="inline"))).kind == "error"
    with pytest.raises(ValueError, match="no mind to"):
        Launcher("inline", debug=True).run(job("says_then_raises", words="inline"))
    with pytest.raises(KeyboardInterrupt):
        Launcher("inline").run(job("interrupted"))


def test_an_abort_is_a_crash_with_its_signal(warm: Launcher) -> None:
    """A worker that dies of SIGABRT gives a record with the signal, the line, machine, stack and launch."""
    record = warm.run(job("aborts"))
    assert (failure(record).kind, "SIGABRT" in failure(record).message) == ("crash", True)
    assert "Fatal Python error: Aborted" in failure(record).detail
    assert (record.circumstances.launched, record.circumstances.machine.key) == ("warm", "cpu")


@pytest.mark.parametrize("way", ["warm", "exec"])
def test_a_hang_is_a_timeout_that_says_where(way: Way, request: pytest.FixtureRequest) -> None:
    """A timeout names its limit, phase and remedy, and its detail has the stack that hung."""
    launcher = Launcher("exec") if way == "exec" else request.getfixturevalue("warm")
    observed = failure(launcher.run(job("hangs", timeout_s=1.5)))
    assert (observed.kind, "1.5 s" in observed.message, "timeout_s=" in observed.message) == ("timeout", True, True)
    assert f"phase {observed.phase!r}" in observed.message
    # A slow machine is still importing torch then, and the head of so deep a stack is cut: its frames are what counts.
    assert '", line ' in observed.detail


def test_several_threads_may_run_jobs(warm: Launcher, fake_python: Callable[[str], Path]) -> None:
    """Each thread gets the record of its own case, from a forkserver and from fresh interpreters."""
    template = job("quiet")
    jobs = [
        msgspec.structs.replace(template, case=msgspec.structs.replace(template.case, id=f"own/{n}")) for n in range(6)
    ]
    fresh = Launcher("exec", python=fake_python("time.sleep(0.1); print(sys.argv); sys.exit(7)"))
    with ThreadPoolExecutor(3) as pool:
        forked = list(pool.map(warm.run, jobs))
        failed = list(pool.map(fresh.run, jobs))
    assert [(record.status, record.case.id) for record in forked] == [("ok", f"own/{n}") for n in range(6)]
    assert [(failure(record).message[:6], record.case.id) for record in failed] == [
        (f"own/{n}:"[:6], f"own/{n}") for n in range(6)
    ]
    assert all("exit code 7" in failure(record).message for record in failed)


def test_sys_exit_is_a_crash_with_its_code(warm: Launcher) -> None:
    """A case that calls sys.exit(3) fails with the code."""
    observed = failure(warm.run(job("exits", code=3)))
    assert (observed.kind, "3" in observed.message) == ("crash", True)


def test_an_end_without_record_is_a_crash_with_output(warm: Launcher) -> None:
    """A worker that ends without a record fails with its exit code and its last output."""
    observed = failure(warm.run(job("exits_at_once", code=3)))
    assert (observed.kind, "exit code 3" in observed.message, "last words" in observed.detail) == ("crash", True, True)


def test_a_foreign_sigkill_is_killed(warm: Launcher) -> None:
    """A SIGKILL that the launcher did not send points to the host's memory."""
    observed = failure(warm.run(job("kills_itself")))
    assert (observed.kind, "out of memory" in observed.message) == ("killed", True)


def test_an_exception_is_an_error_with_traceback_and_output(warm: Launcher) -> None:
    """The message has the exception, and the detail has its traceback and the output."""
    observed = failure(warm.run(job("says_then_raises", words="these words")))
    assert (observed.kind, "no mind to" in observed.message) == ("error", True)
    assert "launch_factories.py" in observed.detail
    assert "these words" in observed.detail


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
def test_an_exception_has_its_kind(
    warm: Launcher, factory: str, arguments: dict[str, Any], kind: str, words: str
) -> None:
    """Missing packages, exhausted memory and interrupts have kinds of their own."""
    observed = failure(warm.run(job(factory, **arguments)))
    assert (observed.kind, words in observed.message) == (kind, True)


def test_output_does_not_disturb_the_protocol(warm: Launcher) -> None:
    """A worker may print anything, even events."""
    assert warm.run(job("noisy")).status == "ok"


def test_a_malformed_event_is_a_crash(warm: Launcher) -> None:
    """After a line that is not an event, the record is not trusted."""
    observed = failure(warm.run(job("forges", line='{"event":"finished","record":{"schema":"x"}}')))
    assert (observed.kind, "is not an event" in observed.message) == ("crash", True)


def test_a_record_of_another_case_is_a_crash(warm: Launcher) -> None:
    """A record of a case other than the job's is a crash."""
    other = warm.run(job("quiet"))
    line = encode_event(Finished(msgspec.structs.replace(other, case=job("aborts").case))).decode().strip()
    observed = failure(warm.run(job("forges_and_ends", line=line)))
    assert (observed.kind, "another case" in observed.message) == ("crash", True)


def test_the_forkserver_leaves_cuda_alone(warm: Launcher) -> None:
    """The forkserver has torch and transformers, but neither peft, bitsandbytes nor a CUDA context."""
    preloaded = warm.preloaded
    assert preloaded is not None
    assert {"torch", "transformers"} <= set(preloaded.modules)
    assert not {"peft", "bitsandbytes"} & set(preloaded.modules)
    assert not preloaded.cuda_initialized


def test_the_launcher_needs_no_torch() -> None:
    """A process that launches jobs does not import torch."""
    script = (
        "import sys, hpc_core.launch.launcher; print('torch' in sys.modules, 'hpc_core.worker.main' in sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert printed.stdout.split() == ["False", "False"]


def test_descriptors_do_not_leak(warm: Launcher) -> None:
    """Eight jobs leave launcher and forkserver with as many descriptors as before."""
    assert warm.preloaded is not None
    folders = [Path(f"/proc/{pid}/fd") for pid in (os.getpid(), warm.preloaded.pid)]
    warm.run(job("quiet"))
    before = [len(list(folder.iterdir())) for folder in folders]
    for _ in range(8):
        warm.run(job("quiet"))
    assert [len(list(folder.iterdir())) for folder in folders] == before


def test_programs_do_not_inherit_the_events(warm: Launcher, tmp_path: Path) -> None:
    """A program that a case starts inherits no pipe of the launcher's."""
    assert warm.run(job("lists_inherited_pipes", path=str(tmp_path / "pipes"))).status == "ok"
    assert (tmp_path / "pipes").read_text() == "[]\n"


def test_a_preload_over_its_limit_falls_back() -> None:
    """A preload that exceeds its limit falls back to fresh interpreters."""
    with Launcher("warm", preload_limit_s=0.05) as launcher:
        launcher.prepare()
    assert (launcher.way, "0.05 s" in launcher.notes[0]) == ("exec", True)


def test_a_missing_interpreter_is_a_launch_error() -> None:
    """A missing interpreter raises LaunchError."""
    with pytest.raises(LaunchError, match="not a program that can be run"):
        Launcher("exec", python="/nowhere/python").run(job("quiet"))


def test_a_failed_preload_falls_back_and_says_so(tmp_path: Path) -> None:
    """If torch cannot be imported, jobs run in fresh interpreters, and the launcher says why."""
    (tmp_path / "torch.py").write_text("raise ImportError('this torch is broken')\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    with Launcher("warm", environment={"PYTHONPATH": path}) as launcher:
        launcher.prepare()
    assert launcher.way == "exec"
    assert "this torch is broken" in launcher.notes[0]


def test_a_lost_forkserver_is_replaced_by_fresh_interpreters(fake_python: Callable[[str], Path]) -> None:
    """If the forkserver ended between two jobs, the next runs in a fresh interpreter, and its record says so."""
    script = """\
import json
if "--socket-fd" not in sys.argv: sys.exit(7)  # started as a worker
ready = {"pid": os.getpid(), "seconds": 0.0, "modules": [], "cuda_initialized": False}
os.write(int(sys.argv[sys.argv.index("--socket-fd") + 1]), json.dumps(ready).encode())
"""
    with Launcher("warm", python=fake_python(script)) as launcher:
        launcher.prepare()
        assert launcher.preloaded is not None
        os.waitid(os.P_PID, launcher.preloaded.pid, os.WEXITED | os.WNOWAIT)
        record = launcher.run(job("quiet"))
    assert (record.circumstances.launched, "exit code 7" in failure(record).message) == ("exec", True)
    assert any("forkserver has ended" in note for note in record.circumstances.notes)
