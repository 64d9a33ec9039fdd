"""`git bisect run pytest --benchmark --perf-bisect`: which commits are bad, good, or cannot be tested."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_core.gate.exit_code import ExitCode
from hpc_core.plugin.outcome import bisect_exit_code
from tests.compare.compare_repository import STEP, commit, git, repository
from tests.plugin.scripted_project import Run, scripted_project

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PYPROJECT = """\
[tool.pytest.ini_options]
perf_cases = ["perf_cases.py"]
addopts = ["--perf-launch=exec", "-p", "no:cacheprovider"]
"""


@pytest.mark.parametrize(
    ("exit_status", "blames", "code"),
    [
        (0, [], 0),
        (1, ["worse"], 1),
        (1, ["broken", "worse"], 1),
        (1, ["broken"], 125),
        (1, ["not comparable"], 125),
        (1, ["other"], 125),
        (2, [], 125),
        (5, [], 125),
    ],
)
def test_only_a_worse_number_makes_a_commit_bad(exit_status: int, blames: list[str], code: int) -> None:
    """Any other failure, an error of collection too, skips the commit."""
    assert bisect_exit_code(exit_status, blames) is ExitCode(code)  # type: ignore[arg-type]


def test_what_cannot_be_judged_is_skipped(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """A case without a baseline, and a missing case, exit with 125 only in a bisection."""
    suite = "def test_step(perf):\n    perf('scripted:step')\n"
    run: Run = scripted_project(pytester, monkeypatch, {"test_it.py": suite})
    assert run("--benchmark").ret == 0
    assert run("--benchmark", "--perf-bisect").ret == ExitCode.CANNOT_TEST
    unknown = ("--benchmark", "--case", "test_it/test_other")
    assert run(*unknown).ret == pytest.ExitCode.USAGE_ERROR
    assert run(*unknown, "--perf-bisect").ret == ExitCode.CANNOT_TEST


@pytest.mark.nightly
def test_git_bisect_finds_the_commit(tmp_path: Path) -> None:
    """The command printed below a red case finds the commit, and skips commits that cannot be imported."""
    root = tmp_path / "repo"
    repository(root, 64)
    (root / "pyproject.toml").write_text(PYPROJECT)
    good = commit(root, "number 1", STEP.format(kib=65))
    updated = run_shell(root, f"{sys.executable} -m pytest --benchmark --perf-update --reason first")
    assert updated.returncode == 0, updated.stdout
    commit(root, "the baseline", STEP.format(kib=65))
    commit(root, "does not import", "raise RuntimeError('this commit does not even import')\n")
    (root / "conftest.py").write_text("raise RuntimeError('nor does this one')\n")
    commit(root, "no conftest", STEP.format(kib=64))
    (root / "conftest.py").unlink()
    commit(root, "drift", STEP.format(kib=64))
    bad = commit(root, "bigger", STEP.format(kib=8192))
    red = run_shell(root, f"{sys.executable} -m pytest --benchmark")
    assert red.returncode == 1, red.stdout
    printed = re.findall(
        r"Find the commit: (git bisect start HEAD (\w+) && git bisect run pytest .*--perf-bisect)", red.stdout
    )
    assert len(printed) == 2, f"below the failure and below the table: {red.stdout}"
    command, start = printed[0]
    assert good.startswith(start)
    searched = run_shell(root, command)
    assert f"{bad} is the first bad commit" in searched.stdout, searched.stdout + searched.stderr
    git(root, "bisect", "reset")


def run_shell(root: Path, command: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CI": ""}
    return subprocess.run(
        ["sh", "-c", command], cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
