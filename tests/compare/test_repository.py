"""Comparisons in a real repository: what is refused before anything runs, what is left behind, and one bisection to the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpc_core.case.case import CallableSpec, Case
from hpc_core.case.errors import SpecError
from hpc_core.case.select import load_case_file
from hpc_core.cli import main
from hpc_core.compare.arrange import Asked, arrange
from hpc_core.compare.checkouts import Checkouts
from tests.compare_repository import STEP, commit, git, repository

ROOT = Path(__file__).parents[2]
FILE = ("--cases", "perf_cases.py")


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three commits; the working directory is at its top, and hpc_core is importable there."""
    root = tmp_path / "repo"
    repository(root, 64, 64, 128)
    monkeypatch.chdir(root)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return root


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a refused command says: exit code 2, one line, nothing on stdout."""
    with pytest.raises(SystemExit) as end:
        main([*arguments])
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, ""), err
    assert "Traceback" not in err
    return err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["ab"], "Nothing to compare"),
        (["ab", "nowhere", *FILE], "has no revision 'nowhere'"),
        (["ab", "HEAD", "nowhere", *FILE], "has no revision 'nowhere'"),
        (["ab", "HEAD", "--base-python", "python", *FILE], "Two revisions and two interpreters at once"),
        (["ab", "--base-python", "no/such/python", *FILE], "no program that can be run"),
        (["ab", "HEAD", *FILE, "--case", "own/stop"], "Near: own/step"),
        (["ab", "HEAD", *FILE, "--budget", "soon"], "say 10m, 90s or 1.5h"),
        (["ab", "HEAD", *FILE, "--wall-tolerance", "0.1"], "say --wall-tolerance 5%"),
        (["ab", "HEAD", *FILE, "--path", "lib"], "no such folder"),
        (["ab", "HEAD", *FILE, "--head-fault", "decode-slep"], "Near: decode-sleep"),
        (["bisect", "own/step", "peak_bytes", "nowhere..HEAD", *FILE], "has no revision 'nowhere'"),
        (["bisect", "own/step", "peak_bytes", "HEAD..HEAD~1", *FILE], "the good end comes first"),
        (["bisect", "own/step", "peak_bytes", "HEAD..main", *FILE], "are the same commit"),
        (["bisect", "own/step", "peak_bytes", "HEAD~1", *FILE], "say GOOD..BAD"),
        (["bisect", "own/step", "peak_bytes", *FILE], "Nothing to bisect"),
        (["bisect", "own/stop", "peak_bytes", "HEAD~1..HEAD", *FILE], "Near: own/step"),
        (["bisect", "own/step", "peak_bytes", "HEAD~1..HEAD", "--versions", "1,2", *FILE], "say which, with --package"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(arguments: list[str], text: str, repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bad input is refused before anything runs, in one line, and leaves no worktree."""
    assert text in said(capsys, *arguments)
    assert git(repo, "worktree", "list").count("\n") == 0


def test_without_a_repository_there_are_no_revisions(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Outside a repository, and without git, the answer says what would work."""
    plain = tmp_path / "plain"
    plain.mkdir()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.chdir(plain)
    assert "in no git repository" in said(capsys, "ab", "HEAD", "--scale", "tiny")
    monkeypatch.setenv("PATH", str(plain))
    assert "git is not installed" in said(capsys, "ab", "HEAD", "--scale", "tiny")


def test_histories_that_parted_are_refused(repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bad end that does not descend from the good one: the answer names where they parted."""
    parted = git(repo, "rev-parse", "HEAD~1")
    git(repo, "checkout", "-q", "-b", "side", parted)
    commit(repo, "elsewhere", STEP.format(kib=32))
    text = said(capsys, "bisect", "own/step", "peak_bytes", "side..main", *FILE)
    assert f"Start where they parted: {parted[:9]}..main" in text


def arranged(repo: Path, base: str, *cases: Case) -> tuple[str, str, tuple[str, ...], str]:
    """Labels, notes and whose code measures."""
    with Checkouts(repo) as checkouts:
        found = arrange(Asked(base=base), cases, checkouts, repo, repo, in_git=True)
        assert found.base.folder.is_dir()
        found.check()
    assert not checkouts.folder.exists()
    return found.base.label, found.head.label, found.notes, found.measured_by


def test_an_uncommitted_tree_can_be_head(repo: Path) -> None:
    """The working tree is measured as it is; a clean one at the base's commit is told to be an A/A."""
    cases = load_case_file(repo / "perf_cases.py")
    *_, notes, measured_by = arranged(repo, "main", *cases)
    assert "A/A" in notes[0]
    assert measured_by == "Measured by one hpc-core on both sides."
    (repo / "work" / "step.py").write_text(STEP.format(kib=96))
    base, head, notes, _ = arranged(repo, "main", *cases)
    short = git(repo, "rev-parse", "HEAD")[:9]
    assert (base, head, notes) == (f"main ({short})", f"the working tree ({short}, 1 file changed)", ())


def test_a_tree_that_is_edited_meanwhile_is_refused(repo: Path) -> None:
    """A change of the working tree between two pairs is noticed."""
    cases = load_case_file(repo / "perf_cases.py")
    with Checkouts(repo) as checkouts:
        found = arrange(Asked(base="main"), cases, checkouts, repo, repo, in_git=True)
        (repo / "work" / "step.py").write_text(STEP.format(kib=65))
        with pytest.raises(SpecError, match="changed while it was measured"):
            found.check()


def test_code_from_elsewhere_is_refused(repo: Path) -> None:
    """A step that both sides would import from the same installed package would compare it with itself."""
    case = Case(id="own/json", scale="tiny", workload=CallableSpec(factory="msgspec.json:encode"))
    with pytest.raises(SpecError, match=r"not from this side's tree .* --path DIR"):
        arranged(repo, "main", case)


def test_another_protocol_is_refused(repo: Path) -> None:
    """A repository that holds an hpc_core of another schema cannot be base: its records could not be read."""
    stub = repo / "hpc_core"
    (stub / "launch").mkdir(parents=True)
    for name in ("__init__", "launch/__init__"):
        (stub / f"{name}.py").write_text("")
    (stub / "record.py").write_text("import msgspec\nclass Record(msgspec.Struct):\n    shiny: int = 0\n")
    (stub / "launch" / "protocol.py").write_text("import msgspec\nclass Job(msgspec.Struct):\n    case: int\n")
    (stub / "spec.py").write_text("SCHEMA = 99\ndef case_from_json(text): raise ValueError(text)\n")
    git(repo, "add", "-A")
    git(repo, "commit", "-q", "-m", "its own hpc_core")
    cases = load_case_file(repo / "perf_cases.py")
    with pytest.raises(SpecError, match="own hpc-core with schema 99; this one speaks 1"):
        arranged(repo, "main", *cases)
    (stub / "spec.py").write_text("SCHEMA = 1\ndef case_from_json(text): raise ValueError(text)\n")
    git(repo, "commit", "-q", "-a", "-m", "the same schema")
    with pytest.raises(SpecError, match=r"records hold Record.shiny, unknown to this one"):
        arranged(repo, "main", *cases)


HOLDS = """
import sys, time
from pathlib import Path
from hpc_core.compare.checkouts import Checkouts
checkouts = Checkouts(Path(sys.argv[1]))
print(checkouts.check_out("base", "HEAD"), flush=True)
time.sleep(60)
"""


def test_a_killed_comparison_leaves_no_worktree(repo: Path) -> None:
    """Even SIGKILL, which nothing can handle, leaves neither folder nor worktree."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = (sys.executable, "-c", HOLDS, str(repo))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}) as process:
        assert process.stdout is not None
        tree = Path(process.stdout.readline().strip())
        assert (tree / "work" / "step.py").is_file()
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while tree.parent.parent.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not tree.parent.parent.exists()
    assert git(repo, "worktree", "list").count("\n") == 0


@pytest.mark.slow
def test_the_commit_that_made_it_bigger_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real workers: the search passes a commit that drifts and one that does not import, ignores what is uncommitted, ends with both numbers.

    Commits speak for themselves, whatever HPC_CORE_COMMIT says of the tree that the command was given in.
    """
    root = tmp_path / "repo"
    commits = repository(root, 64, 65, None, 65, 128, 128)
    (root / "work" / "step.py").write_text("raise RuntimeError('uncommitted')\n")
    monkeypatch.chdir(root)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HPC_CORE_COMMIT", "of-a-copy")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(SystemExit) as end:
        main(["bisect", "own/step", "peak_bytes", f"{commits[0]}..main", *FILE, "--json"])
    out, err = capsys.readouterr()
    assert end.value.code == 0, err
    found = json.loads(out)
    assert found["first_bad"][0] == f"{commits[4]} number 4"
    assert found["first_bad"][1].endswith("2 files changed")
    assert (found["before"] // 1024, found["after"] // 1024) == (65, 128)
    assert [step["word"] for step in found["steps"]] == ["skip", "good", "bad"]
    assert found["suspects"] == []
    assert "1 uncommitted changes" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["repo"]
    assert git(root, "worktree", "list").count("\n") == 0
