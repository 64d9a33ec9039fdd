"""The process between launcher and worker, which leaves nothing behind: `python -m hpc_core.launch.supervisor … -- COMMAND`.

It starts the worker, waits for its end or for the launcher's, ends every process below itself, and writes one Exited event.
It knows neither cases nor records, and imports no torch of its own (forked from a forkserver, it finds torch loaded).
Linux only: it relies on prctl and pidfd.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

import psutil

from hpc_core.record.job import Exited, encode_event

ENVIRONMENT = "HPC_CORE_WORKER_ENVIRONMENT"
"""Variable with the worker's extra environment as JSON: not the supervisor's own, and not shown by a process list."""
TIMED_OUT = b"t"
"""On the life pipe: end the worker, but first let it print where it hangs. End of file means: end it now."""

_TRACEBACK_S = 0.3
_SIGTERM_POLL_MS = 200
_END_S = 30.0
_PAUSE_S = 0.01
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def supervise(become_worker: Callable[[], object], *, events_fd: int, life_fd: int) -> None:
    """Fork a worker, wait for its end or for the life pipe, end all processes below, write an Exited event.

    Args:
        become_worker: called in the child; it execs or runs the job, and the child ends if it returns.
        events_fd: where Exited goes; the worker has it too.
        life_fd: read end of a pipe that only the launcher can write to, so that even its SIGKILL shows as end of file.
    """
    # Orphans below this process become its children, even those that called setsid: none can escape.
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    terminated = _take_signals()
    supervisor = os.getpid()
    worker = os.fork()
    if worker == 0:
        try:
            _leave_supervision(supervisor, life_fd)
            become_worker()
        finally:
            if sys.exc_info()[0] is not None:
                traceback.print_exc()
            os._exit(1)  # whatever happened, never fall back into the supervisor's code
    status = _wait(worker, terminated, life_fd)
    killed, statuses = _end_descendants()
    code = os.waitstatus_to_exitcode(statuses.get(worker, signal.SIGKILL) if status is None else status)
    exited = Exited(code if code >= 0 else None, -code if code < 0 else None, leftovers=len(killed - {worker}))
    with contextlib.suppress(BrokenPipeError):  # the launcher has ended
        # The newline ends a line that the worker was killed in the middle of.
        os.write(events_fd, b"\n" + encode_event(exited))


def die_with(parent: int) -> None:
    """Have the kernel send SIGKILL to this process when `parent`, its parent, ends; at once, if that happened already.

    Raises:
        OSError: the kernel refuses.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _prctl(option: int, argument: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, argument, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl({option}, {argument}) failed: {os.strerror(code)}")


def _take_signals() -> list[int]:
    """Note SIGTERM in the returned list, ignore Ctrl-C, which is the launcher's, and leave children to be reaped."""
    noted: list[int] = []
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda number, _: noted.append(number))
    return noted


def _leave_supervision(supervisor: int, life_fd: int) -> None:
    """In the child: a session of its own, default signals, none of the supervisor's descriptors, no life after it."""
    die_with(supervisor)
    os.setsid()
    os.close(life_fd)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # becomes the default action on exec


def _wait(worker: int, terminated: list[int], life_fd: int) -> int | None:
    """Return the worker's wait status; None if it is to be ended.

    Polls a descriptor of the worker itself. Python's wakeup descriptor would do without the poll's timeout, but
    libraries in a forkserver may take it away at a fork (seen with Python 3.12).
    """
    worker_fd = os.pidfd_open(worker)
    poll = select.poll()
    for fd in (worker_fd, life_fd):
        poll.register(fd, select.POLLIN)
    try:
        while True:
            ready = {fd for fd, _ in poll.poll(_SIGTERM_POLL_MS)}
            status = _reap().get(worker)
            if status is not None:
                return status
            if terminated:
                return None
            if life_fd in ready:
                if os.read(life_fd, 1) == TIMED_OUT:
                    os.kill(worker, signal.SIGUSR1)  # the worker's faulthandler prints every thread's traceback
                    time.sleep(_TRACEBACK_S)
                return None
    finally:
        os.close(worker_fd)


def _reap() -> dict[int, int]:
    """Return the wait statuses, by process id, of all children that have ended, without waiting for others."""
    statuses: dict[int, int] = {}
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            statuses[ended[0]] = ended[1]
    return statuses


def _end_descendants() -> tuple[set[int], dict[int, int]]:
    """Kill everything below this process until nothing is left, and reap it; return killed ids and wait statuses.

    Gives up after 30 s: a process stuck in a driver dies when the driver lets go.
    """
    killed: set[int] = set()
    statuses: dict[int, int] = {}
    deadline = time.monotonic() + _END_S
    while time.monotonic() < deadline:
        alive = [child for child in psutil.Process().children(recursive=True) if _runs(child)]
        if not alive:
            break
        for child in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
                killed.add(child.pid)
        time.sleep(_PAUSE_S)
        statuses |= _reap()
    return killed, statuses | _reap()


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def _exec(
    command: list[str], descriptors: tuple[int, ...], environment: dict[str, str], folder: str | None
) -> NoReturn:
    if folder is not None:
        os.chdir(folder)
    for fd in descriptors:
        os.set_inheritable(fd, True)
    os.execvpe(command[0], command, environment)  # noqa: S606 - our own worker


def main(arguments: list[str] | None = None) -> None:
    """Supervise a command that inherits the descriptors of job and events."""
    parser = argparse.ArgumentParser(prog="python -m hpc_core.launch.supervisor", description=__doc__)
    for name in ("--job-fd", "--events-fd", "--life-fd"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--folder", help="where the command runs")
    parser.add_argument("command", nargs="+")
    chosen = parser.parse_args(arguments)
    environment = dict(os.environ)
    environment |= json.loads(environment.pop(ENVIRONMENT, "{}"))
    descriptors = (chosen.job_fd, chosen.events_fd)
    for fd in (*descriptors, chosen.life_fd):
        os.set_inheritable(fd, False)
    supervise(
        lambda: _exec(chosen.command, descriptors, environment, chosen.folder),
        events_fd=chosen.events_fd,
        life_fd=chosen.life_fd,
    )


if __name__ == "__main__":
    main()
