"""Find a worker's processes by the pipe of their events, and kill them: for a supervisor that was stopped or killed and cannot."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

import psutil


def writers(pipe_fd: int) -> list[psutil.Process]:
    """Return the processes of other sessions that can write to this pipe, and all below them.

    Only a reaper, its supervisor and worker, and what these forked have it; all of them are in sessions of their own, unlike a process
    that another thread of this one forked just then.
    """
    pipe = os.fstat(pipe_fd)
    found: set[psutil.Process] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, OSError):
            if os.getsid(process.pid) != os.getsid(0) and _can_write(process.pid, pipe):
                found |= {process, *process.children(recursive=True)}
    return list(found)


def _can_write(pid: int, pipe: os.stat_result) -> bool:
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            # The link has the permissions of the descriptor: both ends of a pipe are one file.
            if os.path.samestat(descriptor.stat(), pipe) and descriptor.lstat().st_mode & 0o200:
                return True
    return False


def kill_all(processes: Iterable[psutil.Process]) -> None:
    """Send SIGKILL to each that still runs, and so has not left its id to another."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            process.kill()
