"""Which interpreter runs a worker, in which environment, and how a fresh one is started under a supervisor."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from hpc_core.case.errors import LaunchError
from hpc_core.launch.channel import Channel
from hpc_core.launch.supervisor import ENVIRONMENT
from hpc_core.record.version import PACKAGE_FOLDER


def executable(python: str | os.PathLike[str] | None) -> str:
    """Return the interpreter to start; this one for None.

    Raises:
        LaunchError: there is no such program, or it may not be run.
    """
    wanted = os.fspath(python) if python is not None else sys.executable
    found = shutil.which(wanted)
    if found is None:
        raise LaunchError(
            f"No worker can be started: {wanted!r} is not a program that can be run. "
            "Give the path of an interpreter that has hpc-core's run extra."
        )
    return found


def worker_environment(extra: dict[str, str] | None) -> dict[str, str]:
    """Return what a worker's environment adds to the launcher's: `extra`, and a PYTHONPATH under which `hpc_core` is found.

    A checkout of hpc_core that is not installed is appended, so it shadows nothing. An installed one is not: its
    neighbours would be another interpreter's packages.
    """
    changed = dict(extra or {})
    home = PACKAGE_FOLDER.parent
    if home.name not in {"site-packages", "dist-packages"}:
        known = changed.get("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
        changed["PYTHONPATH"] = os.pathsep.join([part for part in (known, str(home)) if part])
    return changed


def start_fresh(
    channel: Channel, python: str, environment: dict[str, str] | None, folder: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start a supervisor and a fresh interpreter on the channel's descriptors, and hand those over.

    Args:
        channel: not handed over yet.
        python: the worker's interpreter, a program that exists. The supervisor runs under the launcher's own.
        environment: variables that the worker has beyond this process's.
        folder: the worker's working directory; this process's by default. The supervisor keeps this process's.

    Returns:
        The supervisor; wait for it after the end of the events.

    Raises:
        LaunchError: the operating system cannot start a process.
    """
    job, events, life, output = channel.for_supervisor
    descriptors = ("--job-fd", str(job), "--events-fd", str(events))
    where = () if folder is None else ("--folder", os.fspath(folder))
    supervise = (sys.executable, "-m", "hpc_core.launch.supervisor", *descriptors, "--life-fd", str(life), *where)
    # -u: what the code under test printed is there even if it then crashes.
    work = (python, "-u", "-m", "hpc_core.worker", *descriptors)
    carried = {ENVIRONMENT: json.dumps(worker_environment(environment))}
    try:
        process = subprocess.Popen(
            (*supervise, "--", *work),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=(job, events, life),
            env=os.environ | worker_environment(None) | carried,
            start_new_session=True,  # Ctrl-C in the terminal reaches the launcher only, which then ends the tree
        )
    except OSError as error:
        raise LaunchError(
            f"No worker can be started: {sys.executable} -m hpc_core.launch.supervisor: {error}."
        ) from error
    channel.hand_over()
    return process
