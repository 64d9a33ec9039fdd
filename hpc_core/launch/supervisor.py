"""Leaves nothing behind: the process between launcher and worker, `python -m hpc_core.launch.supervisor … -- COMMAND`.

It starts the worker, waits for its end or for the launcher's, ends every process below itself, writes one Exited event.
It knows neither jobs nor records, and imports no torch of its own (forked from a warm parent, it finds torch loaded).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from hpc_core.launch import tree
from hpc_core.launch.protocol import Exited, encode_event

__all__ = ["ENVIRONMENT", "TIMED_OUT", "main", "supervise"]

ENVIRONMENT = "HPC_CORE_WORKER_ENVIRONMENT"
"""Variable with the worker's extra environment as JSON: not the supervisor's, nor shown by a process list."""
TIMED_OUT = b"t"
"""On the life pipe: end the worker, but first let it say where it hangs. End of file says: end it now."""

_TRACEBACK_S = 0.3
_END_S = 30.0


def supervise(become_worker: Callable[[], object], *, events_fd: int, life_fd: int) -> None:
    """Fork a worker, wait for its end or for a word on the life pipe, end all processes below, write an Exited event.

    Args:
        become_worker: called in the child; it execs or runs the job, and the child ends if it returns.
        events_fd: where Exited goes; the worker has it too.
        life_fd: read end of a pipe that only the launcher can write to, so that even its SIGKILL shows as end of file.
    """
    tree.become_subreaper()
    wake_fd = _wake_on_signals()
    supervisor = os.getpid()
    worker = os.fork()
    if worker == 0:
        try:
            _leave_supervision(supervisor, wake_fd, life_fd)
            become_worker()
        finally:
            if sys.exc_info()[0] is not None:
                traceback.print_exc()
            os._exit(1)  # whatever happened, never fall back into the supervisor's code
    status = _wait(worker, wake_fd, life_fd)
    killed, statuses = tree.end_descendants(limit_s=_END_S)
    code = os.waitstatus_to_exitcode(statuses.get(worker, signal.SIGKILL) if status is None else status)
    exited = Exited(code if code >= 0 else None, -code if code < 0 else None, leftovers=len(killed - {worker}))
    with contextlib.suppress(BrokenPipeError):  # the launcher is gone
        # The newline ends a line that the worker was killed in the middle of.
        os.write(events_fd, b"\n" + encode_event(exited))


def _wake_on_signals() -> int:
    """Signals arrive as bytes on the returned descriptor. Ctrl-C is the launcher's business."""
    read_fd, write_fd = os.pipe()
    os.set_blocking(read_fd, False)
    os.set_blocking(write_fd, False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # a handler must exist for the byte to be written
    signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    return read_fd


def _leave_supervision(supervisor: int, wake_fd: int, life_fd: int) -> None:
    """In the child: a session of its own, default signals, none of the supervisor's descriptors, no life after it."""
    tree.die_with(supervisor)
    os.setsid()
    os.close(signal.set_wakeup_fd(-1))
    os.close(wake_fd)
    os.close(life_fd)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # becomes the default action on exec


def _wait(worker: int, wake_fd: int, life_fd: int) -> int | None:
    """The worker's wait status; None if it is to be ended."""
    poll = select.poll()
    for fd in (wake_fd, life_fd):
        poll.register(fd, select.POLLIN)
    while True:
        ready = {fd for fd, _ in poll.poll()}
        signals = os.read(wake_fd, 4096) if wake_fd in ready else b""
        status = tree.reap().get(worker)
        if status is not None:
            return status
        if signal.SIGTERM in signals:
            return None
        if life_fd in ready:
            if os.read(life_fd, 1) == TIMED_OUT:
                os.kill(worker, signal.SIGUSR1)  # the worker's faulthandler prints every thread's traceback
                time.sleep(_TRACEBACK_S)
            return None


def _exec(command: list[str], descriptors: tuple[int, ...], environment: dict[str, str]) -> NoReturn:
    for fd in descriptors:
        os.set_inheritable(fd, True)
    os.execvpe(command[0], command, environment)  # noqa: S606 - our own worker


def main(arguments: list[str] | None = None) -> None:
    """Supervise a command that inherits the descriptors of job and events."""
    parser = argparse.ArgumentParser(prog="python -m hpc_core.launch.supervisor", description=__doc__)
    for name in ("--job-fd", "--events-fd", "--life-fd"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("command", nargs="+")
    chosen = parser.parse_args(arguments)
    environment = dict(os.environ)
    environment |= json.loads(environment.pop(ENVIRONMENT, "{}"))
    descriptors = (chosen.job_fd, chosen.events_fd)
    for fd in (*descriptors, chosen.life_fd):
        os.set_inheritable(fd, False)
    supervise(
        lambda: _exec(chosen.command, descriptors, environment), events_fd=chosen.events_fd, life_fd=chosen.life_fd
    )


if __name__ == "__main__":
    main()
