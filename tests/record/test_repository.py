"""Git answers whether the code was changed, what files held at a commit, and where a pull request began."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from hpc_core.baselines.accept import accept
from hpc_core.baselines.pull_request import PullRequest, write_pull_request
from hpc_core.case.errors import RepositoryError, SpecError
from hpc_core.launch.launcher import Launcher
from hpc_core.record import environment
from hpc_core.record.files import write_record
from hpc_core.record.git import changed_code, contents, head, listing, merge_base, revisions_of
from tests.record.git_project import GitProject
from tests.strategies import a_record, counted


@pytest.fixture
def project(tmp_path: Path) -> GitProject:
    project = GitProject(tmp_path / "project")
    project.write("code.py", "x = 1\n")
    project.write("baselines/cpu/tiny/lora.json", "{}\n")
    project.write("baselines/cpu/tiny/lora.history.jsonl", "{}\n")
    project.write("settings.json", "{}\n")
    project.commit("first")
    return project


@pytest.mark.parametrize(
    ("path", "dirty"),
    [
        ("code.py", True),
        ("new.py", True),
        ("settings.json", True),
        ("deep/new.toml", True),
        ("native.so", True),
        ("configs/new.json", True),
        ("configs/new.yaml", True),
        ("prompts.txt", True),
        (".env", True),
        ("weights/model.safetensors", True),
        ("junit.xml", False),
        ("report.html", False),
        ("baselines/cpu/tiny/lora.json", False),
        ("baselines/cpu/tiny/lora.history.jsonl", False),
    ],
)
def test_what_makes_a_tree_dirty(project: GitProject, path: str, dirty: bool) -> None:
    """Changed and untracked code, and what code can read, makes a tree dirty; baselines and reports do not."""
    assert not changed_code(project.root)
    project.write(path, "changed = 2\n")
    for folder in (project.root, project.root / "baselines"):  # any folder answers for the whole tree
        assert changed_code(folder) == ((path,) if dirty else ())


def test_what_a_run_writes_is_no_change_of_code(project: GitProject) -> None:
    """A record, a baseline that is new, the table of pytest-benchmark: the next case of the same run may be accepted, too."""
    write_record(project.root / "records" / "tiny" / "lora.json", a_record({"operators": counted(1)}))
    accept(project.root / "others", a_record({"operators": counted(1)}), reason="first", allow_dirty=True)
    next((project.root / "others").rglob("*.history.jsonl")).unlink()
    write_pull_request(project.root / "records", PullRequest(revision="main", merge_base="0123abc", loosened=()))
    project.write("records/.code-states.json", '{"cases":{},"states":{}}')
    project.write(".benchmarks/Linux/0001.json", '{"machine_info":{},"benchmarks":[],"datetime":""}')
    assert not changed_code(project.root)
    project.write("records/tiny/config.json", '{"case":"mine","status":"ok"}')
    assert changed_code(project.root) == ("records/tiny/config.json",)


def test_a_revoked_baseline_is_no_change_of_code(project: GitProject) -> None:
    """Deleting a baseline with its history does not make the tree dirty."""
    for name in ("lora.json", "lora.history.jsonl"):
        (project.root / "baselines" / "cpu" / "tiny" / name).unlink()
    assert not changed_code(project.root)


def test_the_environment_names_the_commit_of_a_copied_tree(
    project: GitProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HPC_CORE_COMMIT overrides the repository, and then it is unknown whether the code was changed."""
    project.write("code.py", "x = 2\n")
    monkeypatch.delenv("HPC_CORE_COMMIT", raising=False)
    assert environment.commit(str(project.root)) == (head(project.root), True)
    monkeypatch.setenv("HPC_CORE_COMMIT", "0123abc")
    assert environment.commit(str(project.root)) == ("0123abc", None)
    monkeypatch.setenv("HPC_CORE_COMMIT", str(head(project.root)))  # hides no change from git
    assert environment.commit(str(project.root)) == (head(project.root), True)
    monkeypatch.setenv("HPC_CORE_COMMIT", "")
    assert environment.commit(str(tmp_path)) == (None, None)


@pytest.mark.parametrize("named", ["main", "0123ab", "0" * 65, "v1.2", "0123abc\n9"])
def test_only_a_hash_names_a_commit(monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    """A branch, a tag or a typing error is refused before anything runs, in one line."""
    monkeypatch.setenv("HPC_CORE_COMMIT", named)
    with pytest.raises(SpecError, match=r"^HPC_CORE_COMMIT='.*' is no commit: set its hash, 7 to 64 .*\.$"):
        environment.commit()
    with pytest.raises(SpecError, match="is no commit"):
        Launcher()


def test_code_before_the_first_commit_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository without a commit names no code, as a folder without git does not."""
    monkeypatch.delenv("HPC_CORE_COMMIT", raising=False)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    (tmp_path / "code.py").write_text("x = 1\n")
    assert environment.commit(str(tmp_path)) == (None, None)


def test_files_of_other_commits(project: GitProject) -> None:
    """`revisions_of` lists the commits that changed a file, oldest first; `contents` reads files at a commit, and is None where there was none."""
    code = project.root / "code.py"
    first = head(project.root)
    project.write("code.py", "x = 2\n")
    second = project.commit("the second")
    project.write("other.py", "")
    project.commit("not of this file")
    assert [(each.commit, each.subject) for each in revisions_of(project.root, [code])] == [
        (first, "first"),
        (second, "the second"),
    ]
    assert first is not None
    absent = project.root / "other.py"
    assert contents(project.root, [(first, code), (first, absent), (second, code)]) == (b"x = 1\n", None, b"x = 2\n")
    names = [path.name for path in listing(project.root, first, project.root / "baselines")]
    assert names == ["lora.history.jsonl", "lora.json"]


def test_where_a_pull_request_began(project: GitProject) -> None:
    """The merge base is the last common commit, however far main has moved on."""
    first = head(project.root)
    project.git("checkout", "-q", "-b", "topic")
    project.write("code.py", "x = 2\n")
    project.commit("on the topic")
    project.git("checkout", "-q", "main")
    project.write("more.py", "")
    project.commit("on main")
    project.git("checkout", "-q", "topic")
    assert merge_base(project.root, "main") == first


def test_a_shallow_clone_says_what_to_fetch(project: GitProject, tmp_path: Path) -> None:
    """Without history there is no merge base, and the error names the checkout option that fetches it."""
    project.git("checkout", "-q", "-b", "topic")
    for number in range(2):
        project.write("code.py", f"x = {number + 5}\n")
        project.commit(f"topic {number}")
    clone = tmp_path / "clone"
    command = ["git", "clone", "-q", "--depth=1", "--no-single-branch", project.root.as_uri(), str(clone)]
    subprocess.run(
        command, check=True, capture_output=True, timeout=60, env=os.environ | {"GIT_CONFIG_GLOBAL": "/dev/null"}
    )
    for revision in ("origin/main", "elsewhere"):
        with pytest.raises(RepositoryError, match="fetch-depth: 0"):
            merge_base(clone, revision)


def test_no_repository_is_one_clear_error(project: GitProject, tmp_path: Path) -> None:
    """A folder outside git, an unknown revision and a path outside the repository are each named."""
    assert head(tmp_path) is None
    with pytest.raises(RepositoryError, match="not a git repository"):
        merge_base(tmp_path, "main")
    with pytest.raises(RepositoryError, match="no revision '--all'"):
        merge_base(project.root, "--all")
    with pytest.raises(RepositoryError, match="outside the repository"):
        revisions_of(project.root, [tmp_path / "elsewhere.json"])


def test_git_dir_of_a_hook_is_ignored(project: GitProject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Git reads the given folder's repository, even inside a hook that sets GIT_DIR."""
    commit = head(project.root)
    assert commit is not None
    monkeypatch.setenv("GIT_DIR", str(project.root / "nowhere"))
    assert head(project.root) == commit
