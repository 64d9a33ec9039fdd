"""Read a git repository: its commit, whether the code differs from it, files of other commits. Every call starts git."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

import msgspec

from hpc_core.case.errors import RepositoryError
from hpc_core.record.files import read_regular

_SECONDS = 120
_OF_ANOTHER_REPOSITORY = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_OBJECT_DIRECTORY")
"""Variables that git sets inside hooks. They would direct every command to the hook's repository."""
CODE_SUFFIXES = frozenset({
    ".py", ".pyx", ".pyi", ".pth", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".so", ".pyd",
    ".toml", ".cfg", ".ini", ".json", ".yaml", ".yml", ".txt", ".jinja", ".jinja2", ".env",
    ".jsonl", ".parquet", ".arrow", ".safetensors", ".gguf", ".bin", ".pt", ".npy", ".npz",
})  # fmt: skip
"""Suffixes of untracked files that count as changes: code, and the configuration, data and weights that it can read."""
_WRITTEN_BY_RUNS = (
    {"case", "status", "circumstances"},  # a record
    {"case", "checksum", "accepted"},  # a baseline
    {"cases", "states"},  # the code of records, for --perf-resume
    {"revision", "merge_base", "loosened"},  # what a pull request loosens
    {"machine_info", "benchmarks"},  # pytest-benchmark's table
)
"""Keys of the untracked JSON files that a run leaves behind."""
_COMPILED = ("*.so", "*.pyd", ":(exclude,glob)**/site-packages/**")
_LARGE_BYTES = 16 * 2**20


class Revision(msgspec.Struct, frozen=True, kw_only=True):
    """A commit that changed a file."""

    commit: str
    at: str
    """When it was committed, ISO 8601 with its offset."""
    subject: str


def head(folder: Path) -> str | None:
    """Return the commit that is checked out; None outside a repository, before its first commit, or without git."""
    try:
        return git(folder, "rev-parse", "--verify", "--quiet", "HEAD^{commit}").decode().strip()
    except RepositoryError:
        return None


def changed_code(folder: Path) -> tuple[str, ...]:
    """Return the paths in the whole tree around `folder` that can be why its code does other work than its commit.

    Files that hpc-core itself writes do not count, or the first accepted baseline would make the tree dirty for all that follow:
    `<variant>.history.jsonl`, `<variant>.profile.json.gz`, and the `<variant>.json` beside a history. Untracked files count only if they
    can be code, or something that code reads; records and the tables of pytest-benchmark are neither.

    Raises:
        RepositoryError: not a repository, or no git.
    """
    root = top(folder)
    entries = _status(root)
    written = {path for _, path in entries if path.endswith(".history.jsonl")}
    return tuple(path for state, path in entries if _counts(root, state, path, written))


def _counts(root: Path, state: str, path: str, written: set[str]) -> bool:
    if path.endswith((".history.jsonl", ".profile.json.gz")):
        return False
    name = PurePosixPath(path)
    # A name such as `.env` has no suffix.
    if state == "??" and ((name.suffix or name.name) not in CODE_SUFFIXES or _is_written_by_a_run(root / path)):
        return False
    history = f"{path.removesuffix('.json')}.history.jsonl"
    return not (path.endswith(".json") and (history in written or (root / history).exists()))


def _is_written_by_a_run(path: Path) -> bool:
    if path.suffix != ".json":
        return False
    try:
        keys = msgspec.json.decode(read_regular(path), type=dict[str, msgspec.Raw]).keys()
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return False
    return any(keys >= own for own in _WRITTEN_BY_RUNS)


def uncommitted(folder: Path) -> tuple[str, ...]:
    """Return the paths that differ from the last commit, untracked ones included and ignored ones not.

    Raises:
        RepositoryError: not a repository, or no git.
    """
    return tuple(path for _, path in _status(folder))


def content(folder: Path) -> dict[Path, str]:
    """Return what the whole tree around `folder` holds: by its root the commit, and by path a digest of each file that differs from it.

    Untracked files count, whatever their names. So do compiled modules that git ignores, since an extension that is built in place is
    one. A submodule, or a repository inside this one, counts by its own commit and files. Of a file above 16 MiB, size and times stand
    for its bytes.

    Raises:
        RepositoryError: not a repository, one without a commit, or no git.
    """
    root = top(folder)
    commit = head(root)
    if commit is None:
        raise RepositoryError(f"The repository {root} has no commit yet.")
    names = [path for _, path in _status(root, "--ignore-submodules=none")]
    names += _names(git(root, "ls-files", "-z", "--others", "--ignored", "--exclude-standard", "--", *_COMPILED))
    found = {root: commit}
    for path in (root / name for name in names):
        if path.is_dir() and not path.is_symlink() and top(path) != root:
            found |= content(path)
        else:
            found[path] = _digest(path)
    return found


def files(folder: Path) -> tuple[Path, ...]:
    """Return the files of the whole tree around `folder` that git knows or does not ignore.

    Raises:
        RepositoryError: not a repository, or no git.
    """
    root = top(folder)
    return tuple(
        root / name for name in _names(git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard"))
    )


def is_ignored(path: Path) -> bool:
    """Return whether git ignores a file or folder, or one that it lies in.

    Raises:
        RepositoryError: not in a repository, or no git.
    """
    folder = path if path.is_dir() else path.parent
    root = top(folder).resolve()
    output = git(root, "ls-files", "-z", "--others", "--ignored", "--exclude-standard", "--directory", "--", str(path))
    whole = path.resolve()
    return any(whole == root / name or root / name in whole.parents for name in _names(output))


def _digest(path: Path) -> str:
    try:
        facts = path.lstat()
        if path.is_symlink():
            return f"link to {path.readlink()}"
        if not path.is_file() or facts.st_size > _LARGE_BYTES:
            return f"{facts.st_mode} {facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns}"
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except FileNotFoundError:
        return "gone"
    except OSError as error:
        raise RepositoryError(f"{path} cannot be read: {error.strerror}") from error


def _status(folder: Path, *options: str) -> list[tuple[str, str]]:
    """Return state and path of every file that differs from the last commit."""
    entries = _names(git(folder, "status", "--porcelain=v1", "-z", "--no-renames", "--untracked-files=all", *options))
    return [(entry[:2], entry[3:]) for entry in entries]


def _names(output: bytes) -> list[str]:
    return [os.fsdecode(name) for name in output.split(b"\0") if name]


def top(folder: Path) -> Path:
    """Return the root of the tree that `folder` lies in.

    Raises:
        RepositoryError: not a repository, or no git.
    """
    return Path(git(folder, "rev-parse", "--show-toplevel").decode().removesuffix("\n"))


def merge_base(folder: Path, revision: str) -> str:
    """Return the newest commit that HEAD and a revision share: what a pull request against it started from.

    Raises:
        RepositoryError: no such revision, no common commit, or the clone is too shallow.
    """
    fetch = "In a workflow, give actions/checkout `fetch-depth: 0`; by hand: git fetch --unshallow origin."
    shallow = _is_shallow(folder)
    try:
        commit = resolved(folder, revision)
    except RepositoryError as error:
        if shallow:
            raise RepositoryError(f"{revision!r} is not in this shallow clone. {fetch}") from error
        raise
    try:
        return git(folder, "merge-base", commit, "HEAD").decode().strip()
    except RepositoryError as error:
        why = f"This clone is shallow and does not contain it. {fetch}" if shallow else "They have no commit in common."
        raise RepositoryError(f"HEAD and {revision} have no merge base here. {why}") from error


def _is_shallow(folder: Path) -> bool:
    return git(folder, "rev-parse", "--is-shallow-repository").decode().strip() == "true"


def resolved(folder: Path, revision: str) -> str:
    """Return the full hash of a revision: a branch, a tag or a commit.

    Raises:
        RepositoryError: there is none, not a repository, or no git.
    """
    top(folder)
    try:
        # --end-of-options: a revision may begin with a dash.
        output = git(folder, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    except RepositoryError as error:
        shallow = " The clone is shallow: git fetch --unshallow." if _is_shallow(folder) else ""
        raise RepositoryError(
            f"The repository {folder} has no revision {revision!r}.{shallow} Known ones: git branch -a, git tag, git log."
        ) from error
    return output.decode().strip()


def contents(folder: Path, wanted: Sequence[tuple[str, Path]]) -> tuple[bytes | None, ...]:
    """Return the content of files at commits, for each (commit, path), with one call of git; None for a file that did not exist.

    Raises:
        RepositoryError: a path lies outside the repository, or git fails.
    """
    output = _cat_file(folder, "--batch", wanted)
    found: list[bytes | None] = []
    at = 0
    for _ in wanted:
        end = output.index(b"\n", at)
        size = _size(output[at:end])
        at = end + 1
        if size is None:
            found.append(None)
            continue
        found.append(output[at : at + size])
        at += size + 1
    return tuple(found)


def sizes(folder: Path, wanted: Sequence[tuple[str, Path]]) -> tuple[int | None, ...]:
    """Return how many bytes `contents` would return for each; None for a file that did not exist.

    Raises:
        RepositoryError: as `contents`.
    """
    return tuple(map(_size, _cat_file(folder, "--batch-check", wanted).splitlines()))


def _cat_file(folder: Path, how: str, wanted: Sequence[tuple[str, Path]]) -> bytes:
    root = top(folder)
    names = "".join(f"{commit}:{_inside(root, path)}\n" for commit, path in wanted)
    return git(root, "cat-file", how, stdin=names.encode(errors="surrogateescape"))


def _size(line: bytes) -> int | None:
    """Return the size that a line of git names, such as "7c3a… blob 1024"."""
    return None if line.endswith((b" missing", b" ambiguous")) else int(line.rsplit(b" ", 1)[1])


def listing(folder: Path, commit: str, path: Path) -> tuple[Path, ...]:
    """Return the files below a folder at a commit, as paths in the working tree; none if the folder did not exist.

    Raises:
        RepositoryError: the path lies outside the repository, or git fails.
    """
    root = top(folder)
    name = _inside(root, path)
    output = git(root, "ls-tree", "-r", "-z", "--name-only", "--full-tree", commit, "--", f"{name}/" if name else ".")
    return tuple(root / each for each in output.decode(errors="surrogateescape").split("\0") if each)


def revisions_of(folder: Path, paths: Iterable[Path]) -> tuple[Revision, ...]:
    """Return the commits up to HEAD that changed one of these files, oldest first; none before the first commit.

    Raises:
        RepositoryError: a path lies outside the repository, or git fails.
    """
    if head(folder) is None:
        return ()
    root = top(folder)
    names = [_inside(root, path) for path in paths]
    output = git(root, "log", "--reverse", "--format=%H%x1f%cI%x1f%s%x1e", "HEAD", "--", *names)
    parts = [line.strip("\n").split("\x1f") for line in output.decode(errors="replace").split("\x1e") if line.strip()]
    return tuple(Revision(commit=commit, at=at, subject=subject) for commit, at, subject in parts)


def _inside(root: Path, path: Path) -> str:
    """Return the path relative to the root of the tree."""
    root, whole = root.resolve(), path.resolve()
    if not whole.is_relative_to(root):
        raise RepositoryError(f"{path} lies outside the repository {root}, so git cannot read it.")
    relative = whole.relative_to(root).as_posix()
    return "" if relative == "." else relative


def git(folder: Path, *arguments: str, stdin: bytes | None = None) -> bytes:
    """Run a git command in the repository around `folder`, without hooks, and return its output.

    Raises:
        RepositoryError: git is not installed, takes too long, or fails; the message contains its output.
    """
    command = ["git", "-c", "core.hooksPath=/dev/null", "-C", str(folder), *arguments]
    environment = {name: value for name, value in os.environ.items() if name not in _OF_ANOTHER_REPOSITORY}
    try:
        ran = subprocess.run(command, input=stdin, capture_output=True, timeout=_SECONDS, check=False, env=environment)
    except FileNotFoundError as error:
        raise RepositoryError("git is not installed.") from error
    except (OSError, subprocess.SubprocessError) as error:
        raise RepositoryError(f"git cannot be run in {folder}: {error}") from error
    if ran.returncode:
        output = " ".join(ran.stderr.decode(errors="replace").split()) or f"exit code {ran.returncode}"
        raise RepositoryError(f"git {arguments[0]} in {folder}: {output}")
    return ran.stdout
