"""The plugin with real workers, in a user's project: a factory, a bare callable, Ctrl-C, a debugger."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.slow

STEPS = """
import time

def make_step(batch, log=None):
    import torch

    weight = torch.ones(256, 256)

    def step():
        data = torch.ones(batch, 256)
        return (data @ weight).sum()

    return step

def make_nothing(seconds):
    return lambda: time.sleep(seconds)

def breaks():
    raise ValueError("the factory refuses")
"""
TESTS = """
import torch_free
from hpc_core import Limits, MiB

def test_factory(perf):
    result = perf("steps:make_step", batch=16, limits=Limits(peak_bytes=64 * MiB), steps=3)
    assert result.metrics["peak_bytes"].value > 0
    assert result.circumstances.launched == "warm"

def test_too_much(perf):
    perf("steps:make_step", batch=8192, limits=Limits(peak_bytes=MiB), steps=3)

def test_breaks(perf):
    perf("steps:breaks")
"""


@pytest.fixture
def project(pytester: pytest.Pytester) -> Path:
    """A project that uses only the fixture of hpc-core."""
    pytester.makepyprojecttoml('[tool.pytest.ini_options]\nfilterwarnings = ["error"]\nperf_paths = ["performance"]\n')
    pytester.makepyfile(steps=STEPS)
    pytester.mkdir("performance")
    (pytester.path / "performance" / "torch_free.py").write_text(
        "import atexit, sys\n\natexit.register(lambda: print('TORCH', 'torch' in sys.modules))\n"
    )
    return pytester.path


def test_factories_in_fresh_processes(pytester: pytest.Pytester, project: Path) -> None:
    """A factory within its limits, one beyond and one that raises have their own outcomes, and pytest never imports torch."""
    (project / "performance" / "test_steps.py").write_text(TESTS)
    result = pytester.runpytest_subprocess("--benchmark", "--benchmark-json=out.json")
    assert result.ret == 1
    result.assert_outcomes(skipped=1, failed=2)
    result.stdout.fnmatch_lines([
        "peak_bytes * limit at most 1.00 MiB*",
        "error in build: ValueError: the factory refuses",
        "*Run it again: pytest --benchmark --case 'test_steps/test_breaks'",
        "test_steps/test_factory *NO_BASELINE*",
        "test_steps/test_too_much *REGRESSED*",
        "test_steps/test_breaks *BROKEN*",
        "TORCH False",
    ])  # fmt: skip
    entries = json.loads((project / "out.json").read_text())["benchmarks"]
    assert sorted(entry["name"] for entry in entries) == ["test_factory", "test_too_much"]
    assert all(len(entry["stats"]["data"]) == 3 for entry in entries)


INLINE = """
def test_bare(perf):
    import torch

    weight = torch.ones(64, 64)
    record = perf(lambda: weight @ weight)
    assert record.circumstances.launched == "inline"
    assert record.metrics["peak_bytes"].gated
    assert not any(metric.gated for metric in record.metrics.values() if metric.noise == "busy")

def test_needs_something(perf):
    perf(lambda batch: None)

def test_breaks(perf):
    perf("steps:breaks")
"""


def test_what_runs_in_the_test_process(pytester: pytest.Pytester, project: Path) -> None:
    """A bare callable's exact metrics are gated; inline, a factory's error is the test's own, for --pdb."""
    (project / "performance" / "test_inline.py").write_text(INLINE)
    result = pytester.runpytest_subprocess(
        "--benchmark", "--perf-inline", "-W", "ignore", "--perf-update", "--perf-allow-dirty", "--reason", "first"
    )
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines(["A bare callable takes no arguments*"])
    result.stdout.fnmatch_lines(["*raise ValueError*", "E*ValueError: the factory refuses", "steps.py:*: ValueError"])
    assert (project / "baselines" / "cpu" / "test_inline" / "test_bare.json").is_file()


def test_ctrl_c_leaves_nothing(project: Path) -> None:
    """Ctrl-C while a case runs ends with exit code 2, without a worker or a traceback of ours."""
    (project / "performance" / "test_long.py").write_text(
        "def test_long(perf):\n    perf('steps:make_nothing', seconds=600)\n"
    )
    command = [sys.executable, "-m", "pytest", "--benchmark", "--perf-launch=exec", "--perf-records=records"]
    with subprocess.Popen(command, cwd=project, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
        workers = _wait_for_worker(running.pid)
        running.send_signal(signal.SIGINT)
        output, _ = running.communicate(timeout=60)
    assert running.returncode == 2, output
    assert "INTERNALERROR" not in output
    assert [process for process in workers if process.is_running()] == []


def _wait_for_worker(parent: int) -> list[psutil.Process]:
    """The descendants of `parent`, once one of them is a worker."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(psutil.NoSuchProcess):
            processes = psutil.Process(parent).children(recursive=True)
            commands = [process.cmdline() for process in processes]
            if any("hpc_core.worker" in each and "hpc_core.launch.supervisor" not in each for each in commands):
                return processes
        time.sleep(0.1)
    raise AssertionError("no worker was started within 30 s")
