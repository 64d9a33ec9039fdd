"""Comparisons in a real repository: what is refused before anything runs, what is left behind, and one bisection to the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpc_core.case.case import Case
from hpc_core.case.errors import SpecError
from hpc_core.case.select import load_case_file
from hpc_core.case.workloads import CallableSpec
from hpc_core.cli import main
from hpc_core.compare.arrange import KINDS, SideOptions, arrange
from hpc_core.compare.checkouts import Checkouts
from hpc_core.compare.describe import check_protocol, described
from hpc_core.compare.environments import side_of
from tests.compare.compare_repository import STEP, git, repository

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


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
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
        (["ab", "--base-python", "no/such/python", *FILE], "not a program that can be run"),
        (["ab", "HEAD", *FILE, "--case", "own/stop"], "Near: own/step"),
        (["ab", "HEAD", *FILE, "--budget", "soon"], "write 10m, 90s or 1.5h"),
        (["ab", "HEAD", *FILE, "--wall-tolerance", "0.1"], "write --wall-tolerance 5%"),
        (["ab", "HEAD", *FILE, "--path", "lib"], "no such folder"),
        (["ab", "HEAD", *FILE, "--head-fault", "decode-slep"], "Near: decode-sleep"),
        (
            ["bisect", "own/step", "peak_bytes", *FILE],
            "git bisect run pytest --benchmark --perf-bisect --case own/step",
        ),
        (["bisect", "own/stop", "peak_bytes", "--package", "rich", *FILE], "Near: own/step"),
        (["bisect", "own/step", "peak_bytes", "--package", "rich", *FILE], "two versions or more"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(arguments: list[str], text: str, repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bad input is refused before anything runs, in one line, and leaves no worktree."""
    assert text in refusal(capsys, *arguments)
    assert git(repo, "worktree", "list").count("\n") == 0


def test_without_a_repository_there_are_no_revisions(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Outside a repository, and without git, the answer says what would work."""
    plain = tmp_path / "plain"
    plain.mkdir()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.chdir(plain)
    assert "not a git repository" in refusal(capsys, "ab", "HEAD", "--scale", "tiny")
    monkeypatch.setenv("PATH", str(plain))
    assert "git is not installed" in refusal(capsys, "ab", "HEAD", "--scale", "tiny")


def arranged(repo: Path, base: str, *cases: Case) -> tuple[str, str, tuple[str, ...], str]:
    """Labels, notes and whose code measures."""
    with Checkouts(repo) as checkouts:
        found = arrange(SideOptions(base=base), cases, checkouts, repo, repo, in_git=True)
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
        found = arrange(SideOptions(base="main"), cases, checkouts, repo, repo, in_git=True)
        (repo / "work" / "step.py").write_text(STEP.format(kib=65))
        with pytest.raises(SpecError, match="changed while it was measured"):
            found.check()


def test_code_from_elsewhere_is_refused(repo: Path) -> None:
    """A step that both sides would import from the same installed package would compare it with itself."""
    case = Case(id="own/json", scale="tiny", workload=CallableSpec(factory="msgspec.json:encode"))
    with pytest.raises(SpecError, match=r"not from this side's tree .* --path DIR"):
        arranged(repo, "main", case)


DESCRIBE = """\
import json, sys

spoken = {{"home": ".", "job_fields": ["case"], "job_kinds": {kinds}, "cases": [{{"digest": ""}}]}}
json.dump(spoken | {{"schema": {schema}, "record_fields": {{"Record": {fields}}}}}, sys.stdout)
"""
TOO_OLD = "import argparse; parser = argparse.ArgumentParser(); parser.add_argument('--job-fd', required=True); parser.parse_args()"


@pytest.mark.parametrize(
    ("worker", "text"),
    [
        (TOO_OLD, "too old to be compared with this one"),
        (DESCRIBE.format(schema=99, fields=[], kinds=[]), "own hpc-core with schema 99; this one has 1"),
        (DESCRIBE.format(schema=1, fields=["shiny"], kinds=[]), "records hold Record.shiny, unknown to this one"),
        (DESCRIBE.format(schema=1, fields=["case"], kinds=["measure"]), "jobs have no retime"),
        ("raise ModuleNotFoundError('no msgspec here')", "cannot run hpc-core's workers: .*no msgspec here"),
    ],
    ids=["too old", "another schema", "a newer record", "no such job", "no dependencies"],
)
def test_another_protocol_is_refused(worker: str, text: str, repo: Path) -> None:
    """A repository that holds another hpc_core can be a side only if its own worker describes what this launcher understands."""
    (repo / "hpc_core" / "worker").mkdir(parents=True)
    (repo / "hpc_core" / "__init__.py").write_text("")
    (repo / "hpc_core" / "worker" / "__init__.py").write_text("")
    (repo / "hpc_core" / "worker" / "__main__.py").write_text(worker)
    git(repo, "add", "-A")
    git(repo, "commit", "-q", "-m", "its own hpc_core")
    with pytest.raises(SpecError, match=text):
        arranged(repo, "main", *load_case_file(repo / "perf_cases.py"))


def test_a_worker_describes_itself() -> None:
    """Its answer names its home, its protocol, the digest of each case and where code under test lies."""
    case = Case(id="own/json", scale="tiny", workload=CallableSpec(factory="msgspec.json:encode"))
    side = side_of("base", label="here", place=ROOT, here=ROOT, scratch=ROOT)
    found = described(side, [case], versions=["msgspec", "no-such-thing"])
    assert (found.home, found.cases[0].digest) == (str(ROOT / "hpc_core"), case.digest)
    assert {"measure", "retime", "predict"} <= set(found.job_kinds)
    assert (set(found.places), found.versions["no-such-thing"]) == ({"msgspec"}, "")
    check_protocol(side, found, kinds=KINDS, fields=("fault",))


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
