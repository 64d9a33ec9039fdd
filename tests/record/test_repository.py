"""Git answers whether the code was changed, what files held at a commit, and where a pull request began."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from hpc_core.case.errors import RepositoryError
from hpc_core.record import environment
from hpc_core.record.git import contents, head, is_dirty, listing, merge_base, revisions_of
from tests.record.git_project import GitProject


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
        ("records/tiny/lora.json", False),
        ("junit.xml", False),
        ("baselines/cpu/tiny/lora.json", False),
        ("baselines/cpu/tiny/lora.history.jsonl", False),
        ("baselines/cpu/tiny/other.json", False),
    ],
)
def test_what_makes_a_tree_dirty(project: GitProject, path: str, dirty: bool) -> None:
    """Changed and untracked code makes a tree dirty; baselines, records and reports do not."""
    assert not is_dirty(project.root)
    project.write(path, "changed = 2\n")
    assert is_dirty(project.root) is dirty
    assert is_dirty(project.root / "baselines") is dirty  # any folder answers for the whole tree


def test_a_revoked_baseline_is_no_change_of_code(project: GitProject) -> None:
    """Deleting a baseline with its history does not make the tree dirty."""
    for name in ("lora.json", "lora.history.jsonl"):
        (project.root / "baselines" / "cpu" / "tiny" / name).unlink()
    assert not is_dirty(project.root)


def test_the_environment_names_the_commit_of_a_copied_tree(
    project: GitProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HPC_CORE_COMMIT overrides the repository, and then it is unknown whether the code was changed."""
    environment.commit.cache_clear()
    project.write("code.py", "x = 2\n")
    monkeypatch.delenv("HPC_CORE_COMMIT", raising=False)
    assert environment.commit(str(project.root)) == (head(project.root), True)
    environment.commit.cache_clear()
    monkeypatch.setenv("HPC_CORE_COMMIT", "0123abc")
    assert environment.commit(str(project.root)) == ("0123abc", None)
    environment.commit.cache_clear()
    monkeypatch.setenv("HPC_CORE_COMMIT", str(head(project.root)))  # hides no change from git
    assert environment.commit(str(project.root)) == (head(project.root), True)
    monkeypatch.setenv("HPC_CORE_COMMIT", "")
    assert environment.commit(str(tmp_path)) == (None, None)
    environment.commit.cache_clear()


def test_code_before_the_first_commit_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository without a commit names no code, as a folder without git does not."""
    monkeypatch.delenv("HPC_CORE_COMMIT", raising=False)
    environment.commit.cache_clear()
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    (tmp_path / "code.py").write_text("x = 1\n")
    assert environment.commit(str(tmp_path)) == (None, None)
    environment.commit.cache_clear()


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
