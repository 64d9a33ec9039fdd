"""A small git repository for tests: files, commits and branches, whatever the developer's own git is set to."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

__all__ = ["GitProject"]

_OWN = {
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_AUTHOR_NAME": "Ada",
    "GIT_AUTHOR_EMAIL": "ada@example.org",
    "GIT_COMMITTER_NAME": "Ada",
    "GIT_COMMITTER_EMAIL": "ada@example.org",
}


class GitProject:
    """A repository with the branch `main`; commits are a day apart, so that their order is plain."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._commits = 0
        root.mkdir(parents=True, exist_ok=True)
        self.git("init", "-q", "-b", "main")

    def git(self, *arguments: str) -> str:
        """Run git here, and return what it said."""
        date = f"2026-11-{self._commits + 1:02d}T12:00:00+00:00"
        own = _OWN | {"GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date}
        command = ["git", "-C", str(self.root), *arguments]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=os.environ | own)
        return ran.stdout.strip()

    def write(self, path: str, text: str) -> None:
        """Write a file, and the folders above it."""
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text, encoding="utf-8")

    def commit(self, subject: str) -> str:
        """Commit everything that is there, and return the commit."""
        self._commits += 1
        self.git("add", "-A")
        self.git("commit", "-q", "-m", subject)
        return self.git("rev-parse", "HEAD")
