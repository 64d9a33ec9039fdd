"""The way "exec": a fresh interpreter for each worker, under a supervisor run by the launcher's own interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from hpc_core.case.errors import LaunchError
from hpc_core.launch.channel import Channel
from hpc_core.launch.interpreter import worker_environment
from hpc_core.launch.supervisor import ENVIRONMENT

__all__ = ["start_cold"]


def start_cold(
    channel: Channel, python: str, environment: dict[str, str] | None, folder: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start supervisor and worker on the channel's descriptors, and hand those over.

    Args:
        channel: not handed over yet.
        python: the worker's interpreter, a program that exists.
        environment: variables that the worker has beyond this process's.
        folder: the worker's working directory; this process's by default. The supervisor keeps this process's, and its code.

    Returns:
        The supervisor; wait for it after the end of the events.

    Raises:
        LaunchError: the operating system starts no process.
    """
    job, events, life, output = channel.for_supervisor
    descriptors = ("--job-fd", str(job), "--events-fd", str(events))
    there = () if folder is None else ("--folder", os.fspath(folder))
    supervise = (sys.executable, "-m", "hpc_core.launch.supervisor", *descriptors, "--life-fd", str(life), *there)
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
    channel.handed_over()
    return process
