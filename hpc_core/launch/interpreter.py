"""Which interpreter runs a worker, and in which environment. Starts nothing."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import hpc_core
from hpc_core.case.errors import LaunchError

__all__ = ["executable", "worker_environment"]


def executable(python: str | os.PathLike[str] | None) -> str:
    """The interpreter to start; this one for None.

    Raises:
        LaunchError: there is no such program, or it may not be run.
    """
    wanted = os.fspath(python) if python is not None else sys.executable
    found = shutil.which(wanted)
    if found is None:
        raise LaunchError(
            f"No worker can be started: {wanted!r} is no program that can be run. "
            "Give python= the path of an interpreter that has hpc-core's run extra."
        )
    return found


def worker_environment(extra: dict[str, str] | None) -> dict[str, str]:
    """What a worker's environment has beyond the launcher's: `extra`, and a PYTHONPATH under which `hpc_core` is found.

    A checkout of hpc_core that is not installed is appended, so it shadows nothing. An installed one is not: its
    neighbours would be another interpreter's packages.
    """
    changed = dict(extra or {})
    home = Path(hpc_core.__file__).resolve().parent.parent
    if home.name not in {"site-packages", "dist-packages"}:
        known = changed.get("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
        changed["PYTHONPATH"] = os.pathsep.join([part for part in (known, str(home)) if part])
    return changed
