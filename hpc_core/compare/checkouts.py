"""A temporary folder with worktrees of a repository, which goes away however this process ends.

A shell of its own waits at a pipe. When the pipe closes, at the end of the context, on Ctrl-C or because this process was killed, it
removes worktrees and folder. So a SIGKILL leaves nothing behind either.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from hpc_core.compare.revisions import git

__all__ = ["Checkouts"]

_REMOVE_S = 60.0
_KEEPER = """
said=$(cat)
if [ -n "$2" ]; then
  for tree in "$1"/trees/*; do
    [ -d "$tree" ] && git -C "$2" worktree remove --force --force "$tree"
  done
fi
rm -rf -- "$1"
# Without a word the command was killed: a process that it had started may still write here, until it notices.
if [ -z "$said" ]; then sleep 10; rm -rf -- "$1"; fi
"""


class Checkouts:
    """A context manager over the folder. Without a repository it is a temporary folder and nothing more."""

    def __init__(self, root: Path | None) -> None:
        self._root = root
        self.folder = Path(tempfile.mkdtemp(prefix="hpc-core-ab-")).resolve()
        clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        self._keeper = subprocess.Popen(
            ("sh", "-c", _KEEPER, "keeper", os.fspath(self.folder), "" if root is None else os.fspath(root)),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=clean,
            start_new_session=True,  # Ctrl-C in the terminal is not for it
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._keeper.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._keeper.stdin.write(b"done")
            self._keeper.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._keeper.wait(_REMOVE_S)

    def check_out(self, name: str, commit: str) -> Path:
        """The worktree of this name, at this commit; made if it is not there yet, moved if it is.

        Raises:
            SpecError: git cannot check the commit out.
        """
        assert self._root is not None, "a checkout needs a repository"
        tree = self.folder / "trees" / name
        if tree.is_dir():
            git(tree, "checkout", "--quiet", "--detach", "--force", commit)
            git(tree, "clean", "--quiet", "-ffdx")
        else:
            tree.parent.mkdir(exist_ok=True)
            git(self._root, "worktree", "add", "--quiet", "--detach", os.fspath(tree), commit)
        return tree
