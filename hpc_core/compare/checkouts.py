"""A temporary folder with worktrees of a repository, removed however this process ends.

A shell waits at a pipe. When the pipe closes, at the end of the context, on Ctrl-C or because this process was killed, it removes
worktrees and folder. So even SIGKILL leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from hpc_core.record.git import git

_REMOVE_S = 60.0
_CLEANER = """
word=$(cat)
if [ -n "$2" ]; then
  for tree in "$1"/trees/*; do
    [ -d "$tree" ] && git -C "$2" worktree remove --force --force "$tree"
  done
fi
rm -rf -- "$1"
# No word: the command was killed, and a process that it had started may still write here until it notices.
if [ -z "$word" ]; then sleep 10; rm -rf -- "$1"; fi
"""


class Checkouts:
    """A context manager over the folder. Without a repository it is only a temporary folder."""

    def __init__(self, root: Path | None) -> None:
        self._root = root
        self.folder = Path(tempfile.mkdtemp(prefix="hpc-core-ab-")).resolve()
        clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        self._cleaner = subprocess.Popen(
            ("sh", "-c", _CLEANER, "cleaner", os.fspath(self.folder), "" if root is None else os.fspath(root)),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=clean,
            start_new_session=True,  # Ctrl-C in the terminal must not end it
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._cleaner.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._cleaner.stdin.write(b"done")
            self._cleaner.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._cleaner.wait(_REMOVE_S)

    def check_out(self, name: str, commit: str) -> Path:
        """Return a worktree of this commit.

        Raises:
            RepositoryError: git cannot check the commit out.
        """
        assert self._root is not None, "a checkout needs a repository"
        tree = self.folder / "trees" / name
        tree.parent.mkdir(exist_ok=True)
        git(self._root, "worktree", "add", "--quiet", "--detach", os.fspath(tree), commit)
        return tree
