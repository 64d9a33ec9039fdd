"""The processes below one process: who they are, and how to end all of them. Linux only, by /proc and prctl.

Knows nothing of jobs, workers or events.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from pathlib import Path

__all__ = ["become_subreaper", "descendants", "die_with", "end_descendants", "reap"]

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_LIBC = ctypes.CDLL(None, use_errno=True)
_PAUSE_S = 0.01


def _prctl(option: int, argument: int) -> None:
    if _LIBC.prctl(option, argument, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl({option}, {argument}) failed: {os.strerror(code)}")


def become_subreaper() -> None:
    """Orphans below this process become its children, even those that called setsid: none can slip away.

    Raises:
        OSError: the kernel refuses.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with(parent: int) -> None:
    """Have the kernel send SIGKILL to this process when `parent`, its parent, ends; at once, if that happened already.

    Raises:
        OSError: the kernel refuses.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before we asked
        os.kill(os.getpid(), signal.SIGKILL)


def descendants(root: int) -> set[int]:
    """Process ids of everything below `root` that runs, zombies and `root` itself left out."""
    parents: dict[int, int] = {}
    zombies: set[int] = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # it ended while we looked
            # The command's name may hold spaces and brackets; state and parent follow the last bracket.
            state, parent = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
            parents[int(entry.name)] = int(parent)
            if state in "ZX":
                zombies.add(int(entry.name))
    found: set[int] = set()
    level = {root}
    while level:
        level = {pid for pid, parent in parents.items() if parent in level} - found
        found |= level
    return found - zombies


def reap() -> dict[int, int]:
    """Wait statuses by process id of all children that have ended, without waiting for others."""
    statuses: dict[int, int] = {}
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            statuses[ended[0]] = ended[1]
    return statuses


def end_descendants(*, limit_s: float) -> tuple[set[int], dict[int, int]]:
    """Kill everything below this process, again and again until nothing is left, and reap it.

    Needs `become_subreaper`, or orphans escape. Gives up after `limit_s` seconds: a process stuck in a driver dies
    when the driver lets go.

    Returns:
        The process ids that were killed, and the wait statuses that were reaped.
    """
    killed: set[int] = set()
    statuses: dict[int, int] = {}
    deadline = time.monotonic() + limit_s
    while (alive := descendants(os.getpid())) and time.monotonic() < deadline:
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
        time.sleep(_PAUSE_S)
        statuses |= reap()
    return killed, statuses | reap()
