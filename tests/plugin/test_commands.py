"""The commands that a run prints: each can be pasted as it is. Workers are scripted."""

from __future__ import annotations

import re

import msgspec
import pytest

from hpc_core.baselines.accept import accept
from hpc_core.record.record import record_from_json
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
