"""Accepting loses nothing, even if several processes accept at once or one is killed in the middle."""

from __future__ import annotations

import datetime
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import pytest

from hpc_core.baselines import accept as accept_module
from hpc_core.baselines import history, transaction
from hpc_core.baselines.accept import accept
from hpc_core.baselines.baseline import Baseline
from hpc_core.baselines.history import sessions
from hpc_core.baselines.lookup import baseline_path, find
from hpc_core.case.errors import BaselineError
from hpc_core.record import files
from hpc_core.record.record import Record
from tests.explain.profiles import a_profile, weights
from tests.strategies import H100, a_record, around, counted, peak

CASE = "tiny/lora"
AT = datetime.datetime(2026, 11, 30, tzinfo=datetime.UTC)
PROFILE = a_profile(weights())


def of_session(number: int, *, operators: int = 10, profiled: bool = True) -> Record:
    """The record of one session."""
    run = around(started_at=f"2026-11-{number + 1:02d}T10:00:00+00:00")
    metrics = {"operators": counted(operators), "peak_bytes": peak()}
    return a_record(metrics, circumstances=run, profile=PROFILE if profiled else None)


def forked(work: Callable[[], Any]) -> int:
    """Start this work in a forked process."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def ended(pid: int) -> int:
    """The exit code of a process, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_nothing_is_lost_when_six_processes_accept_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The history has all 30 sessions that six processes accepted at once."""
    monkeypatch.setattr(history, "HISTORY_LENGTH", 64)

    def five(first: int) -> None:
        for number in range(first, first + 5):
            accept(tmp_path, of_session(number % 28, operators=number + 1), reason="r")

    assert [ended(pid) for pid in [forked(partial(five, first)) for first in range(0, 30, 5)]] == [0] * 6
    found = sessions(tmp_path, H100.key, CASE)
    assert sorted(session.metrics["operators"][0] for session in found) == list(range(1, 31))
    baseline = find(tmp_path, H100.key, CASE)
    assert isinstance(baseline, Baseline)
    assert baseline.metrics["operators"].value == found[-1].metrics["operators"][0]


def test_a_lock_that_is_held_too_long_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accepting that waits longer than the limit fails with the folder's name and changes nothing."""
    monkeypatch.setattr(transaction, "_WAIT_S", 0.05)
    with (
        transaction.locked(baseline_path(tmp_path, H100.key, CASE).parent),
        pytest.raises(BaselineError, match="another process has been accepting here"),
    ):
        accept(tmp_path, of_session(1), reason="r")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing can be locked, nothing is accepted, rather than lost."""

    def unsupported(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.raises(BaselineError, match=r"cannot lock it \(Function not implemented\)"):
        accept(tmp_path, of_session(1), reason="r")


CHANGES = {
    "updated": (of_session(1), of_session(2, operators=12)),
    "updated without a profile": (of_session(1), of_session(2, operators=12, profiled=False)),
    "unchanged": (of_session(1), of_session(2)),
    "created": (None, of_session(2)),
}


def content(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def killed_at(line: int, root: Path, record: Record) -> bool:
    """Accept a record in a process that kills itself before this line of the writing code; return whether it got there."""
    watched = {module.__file__ for module in (accept_module, transaction, files)}

    def work() -> None:
        passed = 0

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal passed
            if frame.f_code.co_filename not in watched:
                return None
            passed += event == "line"
            if passed > line:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        accept(root, record, reason="second", at=AT)
        sys.settrace(None)

    return ended(forked(work)) == -signal.SIGKILL


def cuts(tmp_path: Path, change: str, step: int) -> Iterator[tuple[Path, dict[str, bytes], dict[str, bytes]]]:
    """Yield the folder after each cut, with its content before and after the whole change."""
    old, new = CHANGES[change]
    first, last = tmp_path / "first", tmp_path / "last"
    first.mkdir()
    if old is not None:
        accept(first, old, reason="first")
    shutil.copytree(first, last)
    assert not killed_at(10**6, last, new)
    line = 0
    while True:
        root = Path(shutil.copytree(first, tmp_path / str(line)))
        if not killed_at(line, root, new):
            return
        yield root, content(first), content(last)
        line += step


def check_cut(root: Path, before: dict[str, bytes], after: dict[str, bytes]) -> None:
    """Check that the folder can be judged as it is, git ignores drafts, and the next start repairs it."""
    left = content(root)
    for name in set(left) - set(before) - set(after):
        folder = (root / name).parent
        assert folder.name == ".accepting"
        assert name.endswith(".gitignore") or (folder / ".gitignore").read_bytes() == b"*\n"
    mixed = {name: raw for name, raw in left.items() if ".accepting" not in name}
    assert all(raw in (before.get(name), after.get(name)) for name, raw in mixed.items())
    [history_file] = [name for name in after if name.endswith(".history.jsonl")]
    [baseline_file] = [name for name in after if name.endswith("lora.json")]
    if mixed.get(history_file) == after[history_file]:
        assert mixed[baseline_file] == after[baseline_file], "a session without its baseline"
    find(root, H100.key, CASE)
    assert content(root) in (before, after)
    assert not list(root.rglob(".accepting"))
    # Accepting goes on from there.
    accept(root, of_session(3, operators=14), reason="third")
    last = sessions(root, H100.key, CASE)[-1]
    assert last.metrics["operators"] == (14.0,)
    assert not list(root.rglob(".accepting"))


def test_a_kill_at_any_of_some_twenty_points_leaves_all_or_nothing(tmp_path: Path) -> None:
    """Baseline, history and profile are all those before the acceptance or all those after it."""
    count = 0
    for root, before, after in cuts(tmp_path, "updated", 13):
        check_cut(root, before, after)
        count += 1
    assert count >= 16


@pytest.mark.nightly
@pytest.mark.parametrize("change", CHANGES)
def test_a_kill_at_every_line_leaves_all_or_nothing(tmp_path: Path, change: str) -> None:
    """The same holds before every line of the writing code, for each kind of acceptance."""
    count = 0
    for root, before, after in cuts(tmp_path, change, 1):
        check_cut(root, before, after)
        count += 1
    assert count >= 100


def test_an_acceptance_that_was_cut_off_is_completed_by_the_next_reader(tmp_path: Path) -> None:
    """The next reader completes the acceptance, even if it only reads the history."""
    accept(tmp_path, of_session(1), reason="first")
    place = baseline_path(tmp_path, H100.key, CASE).parent
    drafts = place / ".accepting"
    drafts.mkdir()
    line = (place / "lora.history.jsonl").read_bytes()
    (drafts / "lora.history.jsonl.new").write_bytes(line + line.replace(b"2026-11-02", b"2026-11-03"))
    (drafts / "journal").write_bytes(msgspec.json.encode({"lora.history.jsonl": True}))
    assert len(sessions(tmp_path, H100.key, CASE)) == 2
    assert not drafts.exists()


@pytest.mark.parametrize("name", ["../lora.json", "/etc/passwd", ".gitignore", ""])
def test_a_foreign_journal_moves_nothing_elsewhere(tmp_path: Path, name: str) -> None:
    """A journal whose names lead out of the folder is dropped."""
    accept(tmp_path, of_session(1), reason="first")
    before = content(tmp_path)
    drafts = baseline_path(tmp_path, H100.key, CASE).parent / ".accepting"
    drafts.mkdir()
    (drafts / "journal").write_bytes(msgspec.json.encode({name: False}))
    assert isinstance(find(tmp_path, H100.key, CASE), Baseline)
    assert content(tmp_path) == before


def test_git_sees_nothing_of_a_cut(tmp_path: Path) -> None:
    """A killed acceptance leaves no file that `git add` would take, even without a rule in .gitignore."""
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    left = 0
    for line in range(60, 200, 10):
        killed_at(line, tmp_path, of_session(1))
        left += any(path.name != ".gitignore" for path in tmp_path.rglob(".accepting/*"))
        status = subprocess.run(
            ["git", "status", "--porcelain", "-uall"], cwd=tmp_path, capture_output=True, check=True
        )
        assert b".accepting" not in status.stdout
    assert left
