"""Revisions of a git repository: finding, ordering and describing commits. Changes nothing in the repository."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from hpc_core.case.errors import RepositoryError, SpecError
from hpc_core.record.git import git as run_git

__all__ = ["Revision", "changed_files", "commits_between", "fingerprint", "git", "repository", "resolve", "uncommitted"]

_FORMAT = "--format=%H %aI %s"


class Revision(msgspec.Struct, frozen=True, kw_only=True):
    """One commit."""

    commit: str
    """40 hex digits."""
    said: str
    """As the user named it."""
    subject: str
    author_date: str
    """ISO 8601."""

    @property
    def short(self) -> str:
        """Nine hex digits."""
        return self.commit[:9]


def git(folder: Path, *arguments: str) -> str:
    """What a git command says, without the newline at its end.

    Raises:
        SpecError: git is not installed, or the command fails; the message holds git's own words.
    """
    try:
        return run_git(folder, *arguments).decode(errors="replace").rstrip("\n")
    except RepositoryError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise SpecError(
                "git is not installed, and two revisions cannot be compared without it. "
                "Install it, or compare two interpreters: --base-python PATH."
            ) from error
        raise SpecError(str(error)) from error


def repository(folder: Path) -> Path:
    """The top of the working tree that holds the folder.

    Raises:
        SpecError: there is no git, or no repository there.
    """
    try:
        return Path(git(folder, "rev-parse", "--show-toplevel")).resolve()
    except SpecError as error:
        if "not installed" in str(error):
            raise
        raise SpecError(
            f"{folder} is in no git repository, so it has no revisions to compare ({error}). "
            "Go to the repository of the code under test, or compare two interpreters: --base-python PATH."
        ) from error


def resolve(root: Path, said: str) -> Revision:
    """The commit that a user named.

    Raises:
        SpecError: the repository has no such revision.
    """
    if not said or said.startswith("-"):
        raise SpecError(f"{said!r} is no revision: say a branch, a tag or a commit.")
    try:
        commit = git(root, "rev-parse", "--verify", "--quiet", f"{said}^{{commit}}")
    except SpecError as error:
        shallow = " The clone is shallow: git fetch --unshallow." if _is_shallow(root) else ""
        raise SpecError(
            f"The repository {root} has no revision {said!r}.{shallow} Known ones: git branch -a, git tag, git log."
        ) from error
    return msgspec.structs.replace(_read(git(root, "show", "--no-patch", _FORMAT, commit)), said=said)


def _read(line: str) -> Revision:
    commit, author_date, subject = line.split(" ", 2)
    return Revision(commit=commit, said=commit[:9], subject=subject, author_date=author_date)


def changed_files(root: Path, revision: Revision) -> int:
    """How many files a commit changed, against its first parent."""
    listed = ("diff-tree", "--no-commit-id", "--name-only", "-r", "-m", "--first-parent", "--root")
    return len(git(root, *listed, revision.commit).splitlines())


def _is_shallow(root: Path) -> bool:
    return git(root, "rev-parse", "--is-shallow-repository") == "true"


def commits_between(root: Path, good: Revision, bad: Revision) -> tuple[Revision, ...]:
    """The commits after `good` up to and with `bad`, oldest first, along first parents: a merge counts as one step.

    Raises:
        SpecError: they are the same commit, stand in the wrong order, or one does not descend from the other.
    """
    if good.commit == bad.commit:
        raise SpecError(f"{good.said} and {bad.said} are the same commit {good.short}: nothing lies between them.")
    common = git(root, "merge-base", good.commit, bad.commit)
    if common == bad.commit:
        raise SpecError(
            f"{bad.said} ({bad.short}) is older than {good.said} ({good.short}): the good end comes first. "
            f"Say {bad.said}..{good.said}, if the newer one is the bad one."
        )
    if common != good.commit:
        raise SpecError(
            f"{bad.said} does not descend from {good.said}. Start where they parted: {common[:9]}..{bad.said}."
        )
    listed = git(root, "log", "--reverse", "--first-parent", _FORMAT, f"{good.commit}..{bad.commit}")
    return tuple(map(_read, listed.splitlines()))


def uncommitted(root: Path) -> tuple[str, ...]:
    """Paths that differ from the last commit, untracked ones included and ignored ones not."""
    parts = git(root, "status", "--porcelain=v1", "-z", "--untracked-files=all", "--no-renames").split("\0")
    return tuple(part[3:] for part in parts if part)


def fingerprint(root: Path) -> str:
    """Changes with the working tree: its commit, and path, size and time of each file that differs from it."""
    seen = [git(root, "rev-parse", "HEAD")]
    for name in uncommitted(root):
        try:
            facts = (root / name).lstat()
        except OSError:
            seen.append(f"{name} is gone")
        else:
            seen.append(f"{name} {facts.st_size} {facts.st_mtime_ns}")
    return hashlib.sha256("\n".join(seen).encode("utf-8", "replace")).hexdigest()
