"""A small git repository for comparisons: a package whose step holds more memory from a known commit on."""

from __future__ import annotations

import subprocess
from pathlib import Path

CASES = """\
from hpc_core import CallableSpec, Case

CASES = [Case(id="own/step", scale="tiny", workload=CallableSpec(factory="work.step:make", steps=3))]
"""
STEP = """\
import torch


def make():
    return lambda: torch.ones({kib}, 256).sum()
"""
BROKEN = "raise RuntimeError('this commit does not even import')\n"


def git(root: Path, *arguments: str) -> str:
    """The output of git, run as a user with a name."""
    who = ("-c", "user.name=Ada", "-c", "user.email=ada@example.org", "-c", "init.defaultBranch=main")
    process = subprocess.run(
        ("git", "-C", str(root), *who, *arguments), check=True, capture_output=True, text=True, timeout=30
    )
    return process.stdout.strip()


def commit(root: Path, subject: str, step: str) -> str:
    """Write the step, commit everything, and return the commit."""
    (root / "work" / "step.py").write_text(step)
    (root / "subject.txt").write_text(subject)
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", subject)
    return git(root, "rev-parse", "HEAD")


def repository(root: Path, *kib: int | None) -> list[str]:
    """Make a commit for each size of the step's tensor (None: one that does not import), and return them, oldest first."""
    (root / "work").mkdir(parents=True)
    git(root, "init", "-q")
    (root / "work" / "__init__.py").write_text("")
    (root / "perf_cases.py").write_text(CASES)
    return [
        commit(root, f"number {number}", BROKEN if size is None else STEP.format(kib=size))
        for number, size in enumerate(kib)
    ]
