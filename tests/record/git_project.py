"""A small git repository for tests, independent of the developer's git settings."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

__all__ = ["GitProject"]

_ENVIRONMENT = {
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_AUTHOR_NAME": "Ada",
    "GIT_AUTHOR_EMAIL": "ada@example.org",
    "GIT_COMMITTER_NAME": "Ada",
    "GIT_COMMITTER_EMAIL": "ada@example.org",
}


class GitProject:
    """A repository with the branch `main`, whose commits are a day apart."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._commits = 0
        root.mkdir(parents=True, exist_ok=True)
        self.git("init", "-q", "-b", "main")

    def git(self, *arguments: str) -> str:
        """Run git here and return its output."""
        date = f"2026-11-{self._commits + 1:02d}T12:00:00+00:00"
        environment = os.environ | _ENVIRONMENT | {"GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date}
        command = ["git", "-C", str(self.root), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=environment)
        return result.stdout.strip()

    def write(self, path: str, text: str) -> None:
        """Write a file and create its folders."""
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text, encoding="utf-8")

    def commit(self, subject: str) -> str:
        """Commit every change and return the commit."""
        self._commits += 1
        self.git("add", "-A")
        self.git("commit", "-q", "-m", subject)
        return self.git("rev-parse", "HEAD")
