"""Comparisons in a real repository: what is refused before anything runs, and what is left behind."""

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
from hpc_core.compare.arrange import SideOptions, arrange
from hpc_core.compare.checkouts import Checkouts
from hpc_core.compare.describe import check_protocol, described
from hpc_core.compare.sides import side_of
from tests.commands import exit_code
from tests.compare.compare_repository import STEP, git, repository

ROOT = Path(__file__).parents[2]
FILE = ("--cases", "perf_cases.py")


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of three commits with the working directory at its top, and temporary files outside it."""
    root = tmp_path / "repo"
    repository(root, 64, 64, 128)
    monkeypatch.chdir(root)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return root


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The last line of a refused command's message: it exits with code 2 and prints nothing on stdout."""
    code = exit_code(main, *arguments)
    out, err = capsys.readouterr()
    assert (code, out) == (2, ""), err
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
    """Bad input is refused in one line before anything runs, and leaves no worktree."""
    assert text in refusal(capsys, *arguments)
    assert git(repo, "worktree", "list").count("\n") == 0


def test_without_a_repository_there_are_no_revisions(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Outside a repository, or without git, the refusal says so."""
    plain = tmp_path / "plain"
    plain.mkdir()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.chdir(plain)
    assert "not a git repository" in refusal(capsys, "ab", "HEAD", "--scale", "tiny")
    monkeypatch.setenv("PATH", str(plain))
    assert "git is not installed" in refusal(capsys, "ab", "HEAD", "--scale", "tiny")


def arranged(repo: Path, base: str, *cases: Case) -> tuple[str, str, tuple[str, ...], str]:
    """The labels of both sides, the notes, and whose code measures."""
    with Checkouts(repo) as checkouts:
        sides = arrange(SideOptions(base=base), cases, checkouts, repo, repo, in_git=True)
        assert sides.base.folder.is_dir()
        sides.check()
    assert not checkouts.folder.exists()
    return sides.base.label, sides.head.label, sides.notes, sides.measured_by


def test_an_uncommitted_tree_can_be_head(repo: Path) -> None:
    """The working tree is measured as it is; a clean one at the base's commit is reported as an A/A."""
    cases = load_case_file(repo / "perf_cases.py")
    *_, notes, measured_by = arranged(repo, "main", *cases)
    assert "A/A" in notes[0]
    assert measured_by == "Measured by one hpc-core on both sides."
    (repo / "work" / "step.py").write_text(STEP.format(kib=96))
    base, head, notes, _ = arranged(repo, "main", *cases)
    short = git(repo, "rev-parse", "HEAD")[:9]
    assert (base, head, notes) == (f"main ({short})", f"the working tree ({short}, 1 file changed)", ())


def test_a_tree_that_is_edited_meanwhile_is_refused(repo: Path) -> None:
    """An edit of the working tree between two pairs is refused."""
    cases = load_case_file(repo / "perf_cases.py")
    with Checkouts(repo) as checkouts:
        sides = arrange(SideOptions(base="main"), cases, checkouts, repo, repo, in_git=True)
        (repo / "work" / "step.py").write_text(STEP.format(kib=65))
        with pytest.raises(SpecError, match="changed while it was measured"):
            sides.check()


def test_code_from_elsewhere_is_refused(repo: Path) -> None:
    """A step that both sides would import from the same installed package is refused."""
    case = Case(id="own/json", scale="tiny", workload=CallableSpec(factory="msgspec.json:encode"))
    with pytest.raises(SpecError, match=r"not from this side's tree .* --path DIR"):
        arranged(repo, "main", case)


DESCRIBE = """\
import json, sys

description = {{"home": ".", "job_fields": ["case"], "job_kinds": {kinds}, "cases": [{{"digest": ""}}]}}
json.dump(description | {{"schema": {schema}, "record_fields": {{"Record": {fields}}}}}, sys.stdout)
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
    """A side with its own hpc_core is refused unless its worker speaks this launcher's protocol."""
    (repo / "hpc_core" / "worker").mkdir(parents=True)
    (repo / "hpc_core" / "__init__.py").write_text("")
    (repo / "hpc_core" / "worker" / "__init__.py").write_text("")
    (repo / "hpc_core" / "worker" / "__main__.py").write_text(worker)
    git(repo, "add", "-A")
    git(repo, "commit", "-q", "-m", "its own hpc_core")
    with pytest.raises(SpecError, match=text):
        arranged(repo, "main", *load_case_file(repo / "perf_cases.py"))


def test_a_worker_describes_itself() -> None:
    """A worker's description has its home, its protocol, each case's digest and the places of the code under test."""
    case = Case(id="own/json", scale="tiny", workload=CallableSpec(factory="msgspec.json:encode"))
    side = side_of("base", label="here", place=ROOT, here=ROOT, scratch=ROOT)
    description = described(side, [case], versions=["msgspec", "no-such-thing"])
    assert (description.home, description.cases[0].digest) == (str(ROOT / "hpc_core"), case.digest)
    assert {"measure", "retime", "predict"} <= set(description.job_kinds)
    assert (set(description.places), description.versions["no-such-thing"]) == ({"msgspec"}, "")
    check_protocol(side, description, fields=("fault",))


HOLD_A_WORKTREE = """
import sys, time
from pathlib import Path
from hpc_core.compare.checkouts import Checkouts
checkouts = Checkouts(Path(sys.argv[1]))
print(checkouts.check_out("base", "HEAD"), flush=True)
time.sleep(60)
"""


def test_a_killed_comparison_leaves_no_worktree(repo: Path) -> None:
    """A comparison that is killed by SIGKILL leaves neither folder nor worktree."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = (sys.executable, "-c", HOLD_A_WORKTREE, str(repo))
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
