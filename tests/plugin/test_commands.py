"""The commands that a run prints: each can be pasted as it is. Workers are scripted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from hpc_core.baselines.accept import accept
from hpc_core.record.record import record_from_json
from hpc_core.report.command import Command
from tests.compare.compare_repository import git
from tests.plugin.scripted_project import Run, scripted_project

pytestmark = pytest.mark.slow

SUITE = """
from hpc_core import GiB

def test_more(perf):
    perf("scripted:step", peak=2 * GiB)

def test_less(perf):
    perf("scripted:step", peak=GiB)

def test_extended(perf):
    perf("scripted:step", peak=GiB)

def test_new(perf):
    perf("scripted:step", peak=GiB)

def test_crash(perf):
    perf("scripted:crash")
"""


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a suite with a case that got worse, one that improved, one with a new metric, one without a baseline, and a crash."""
    run_pytest = scripted_project(pytester, monkeypatch, {"test_own.py": SUITE})
    run_pytest("--benchmark", "--perf-update", "--reason=first", "--perf-baselines=accepted")
    root = pytester.path / "accepted"
    for name, factor in (("more", 0.5), ("less", 2), ("extended", 1)):
        history = root / "cpu" / "test_own" / f"test_{name}.history.jsonl"
        record = record_from_json(history.read_text())
        peak = record.metrics["peak_bytes"]
        changed = {"peak_bytes": msgspec.structs.replace(peak, value=int(peak.value * factor))}
        metrics = record.metrics | changed
        if name == "extended":
            metrics.pop("operators")
        accept(root, msgspec.structs.replace(record, metrics=metrics), reason="doctored")
    for path in root.rglob("test_new.*"):
        path.unlink()
    return run_pytest


def printed(result: pytest.RunResult) -> list[str]:
    """Return the commands that a run printed."""
    return re.findall(r"pytest --.*", str(result.stdout))


def test_no_command_accepts_a_fault(run: Run) -> None:
    """With --perf-fault no command has --perf-update, which would be refused."""
    plain = printed(run("--benchmark", "--perf-baselines=accepted", "--perf-strict"))
    assert any("--perf-update" in command for command in plain)
    faulted = printed(run("--benchmark", "--perf-baselines=accepted", "--perf-strict", "--perf-fault=retained-64mib"))
    assert faulted
    assert all("--perf-fault retained-64mib" in command for command in faulted)
    assert not any("--perf-update" in command or "--perf-bisect" in command for command in faulted)


def test_every_command_names_the_folder_of_baselines(run: Run) -> None:
    """A folder that was named on the command line is part of every command, or a pasted one would write elsewhere."""
    commands = printed(run("--benchmark", "--perf-baselines=accepted", "--perf-strict"))
    assert len(commands) > 4
    assert all("--perf-baselines=accepted" in command for command in commands)


def test_the_command_for_a_gain_keeps_it(pytester: pytest.Pytester, run: Run) -> None:
    """The printed command, with a reason, makes the next strict run of the case green."""
    commands = printed(run("--benchmark", "--perf-baselines=accepted"))
    [command] = [each for each in commands if "test_less" in each]
    arguments = command.replace("'", "").replace('"…"', "faster").split()[1:]
    assert run(*arguments).ret == 0
    assert run("--benchmark", "--perf-baselines=accepted", "--case=test_own/test_less", "--perf-strict").ret == 0


def test_a_run_names_the_python_whose_pytest_the_shell_does_not_find(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `pytest` is not on the path, or is another environment's, commands begin with this Python."""
    monkeypatch.setenv("PATH", os.defpath)
    text = str(run("--benchmark", "--perf-baselines=accepted").stdout)
    assert f"{sys.executable} -m pytest --benchmark --case" in text


@pytest.mark.parametrize(
    ("folder", "pasted_in"), [("", ""), ("models/two words", ""), ("models/two words", "models/two words")]
)
def test_the_printed_search_finds_the_commit(tmp_path: Path, folder: str, pasted_in: str) -> None:
    """It works from the root of the repository and from the folder of the run, whichever folder that is."""
    here = tmp_path / folder
    (tmp_path / "models" / "two words").mkdir(parents=True)
    (tmp_path / "models" / "two words" / "kept").touch()
    git(tmp_path, "init", "-q")
    commits: list[str] = []
    for kib in (1, 1, 2, 2):
        (here / "check").write_text(f"#!/bin/sh\ntest {kib} = 1 # {len(commits)}\n")
        (here / "check").chmod(0o755)
        git(tmp_path, "add", "-A")
        git(tmp_path, "commit", "-q", "-m", "a step")
        commits.append(git(tmp_path, "rev-parse", "HEAD"))
    search = Command(case="own/step", start="./check", folder=folder).bisect(commits[0][:10])
    output = subprocess.run(
        ["sh", "-c", search], cwd=tmp_path / pasted_in, capture_output=True, text=True, timeout=60, check=False
    )
    assert f"{commits[2]} is the first bad commit" in output.stdout, output.stdout + output.stderr
