"""The processes between launcher and worker, which leave nothing behind: `python -m hpc_core.launch.supervisor … -- COMMAND`.

    launcher ─ reaper ─ supervisor ─ worker ─ whatever it starts

The supervisor starts the worker, waits for its end or for the launcher's, ends every process below itself, and writes one Exited
event. The reaper does so if the code under test kills the supervisor, and lets it go on if it was stopped.
They know neither cases nor records, and import no torch of their own (forked from a forkserver, they find torch loaded).
Linux only: they rely on prctl and pidfd.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import select
import signal
import stat
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
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
_MOST_OUTPUT_BYTES = 1 << 28
_FOR_REAPER = {signal.SIGCHLD, signal.SIGTERM}
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def supervise(become_worker: Callable[[], object], *, events_fd: int, life_fd: int) -> None:
    """Be the reaper of a supervisor and its worker; return when all processes below have ended and an Exited event is written.

    Args:
        become_worker: called in the worker; it execs or runs the job, and the worker ends if it returns.
        events_fd: where Exited goes; the worker has it too.
        life_fd: read end of a pipe that only the launcher can write to, so that even its SIGKILL shows as end of file.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    mask = set(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_REAPER)))
    supervisor = _child(lambda: _supervise(become_worker, mask, events_fd, life_fd))
    os.close(life_fd)
    ended = _outlive(supervisor)
    if ended is not None:
        statuses, alive = _end_descendants()
        _report(events_fd, Exited(None, None, leftovers=_count_killed(statuses), alive=alive, supervisor=ended))


def _supervise(become_worker: Callable[[], object], mask: set[int], events_fd: int, life_fd: int) -> None:
    """Fork a worker, wait for its end or for the life pipe, end all processes below, report."""
    terminated = _take_signals()
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    supervisor = os.getpid()

    def work() -> None:
        _leave_supervision(supervisor, life_fd)
        become_worker()
        os._exit(1)

    worker = _child(work)
    status = _wait(worker, terminated, life_fd)
    statuses, alive = _end_descendants()
    status = statuses.pop(worker, signal.SIGKILL) if status is None else status
    code = os.waitstatus_to_exitcode(status)
    leftovers = _count_killed(statuses)
    _report(events_fd, Exited(code if code >= 0 else None, -code if code < 0 else None, leftovers, alive))


def _child(work: Callable[[], object]) -> int:
    """Fork, and return the child's process id. Orphans below this process become its children: none escapes by setsid."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            if sys.exc_info()[0] is not None:
                traceback.print_exc()
            os._exit(code)  # whatever happened, never fall back into the parent's code
    return child


def _report(events_fd: int, exited: Exited) -> None:
    with contextlib.suppress(BrokenPipeError):  # the launcher has ended
        # The newline ends a line that the worker was killed in the middle of.
        os.write(events_fd, b"\n" + encode_event(exited))


def _outlive(supervisor: int) -> str | None:
    """Wait until the supervisor has ended; return how if it did not report, as a signal's name or an exit code, else None."""
    while True:
        if signal.sigwait(_FOR_REAPER) == signal.SIGTERM:
            os.kill(supervisor, signal.SIGTERM)
        state = os.waitid(os.P_PID, supervisor, os.WEXITED | os.WSTOPPED | os.WNOHANG)
        if state is None:
            continue
        if state.si_code == os.CLD_STOPPED:
            os.kill(supervisor, signal.SIGCONT)
        elif state.si_code != os.CLD_EXITED:
            return signal.Signals(state.si_status).name
        else:
            return f"exit code {state.si_status}" if state.si_status else None


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
    """Note SIGTERM in the returned list, and ignore Ctrl-C, which is the launcher's."""
    noted: list[int] = []
    signal.signal(signal.SIGINT, signal.SIG_IGN)
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
            _cut_output()
            if terminated:
                return None
            if life_fd in ready:
                if os.read(life_fd, 1) == TIMED_OUT:
                    os.kill(worker, signal.SIGUSR1)  # the worker's faulthandler prints every thread's traceback
                    time.sleep(_TRACEBACK_S)
                return None
    finally:
        os.close(worker_fd)


def _cut_output() -> None:
    """Let a worker that prints without end start its output's file again, before that fills the disk."""
    if stat.S_ISREG(os.fstat(1).st_mode) and os.fstat(1).st_size > _MOST_OUTPUT_BYTES:
        os.ftruncate(1, 0)
        os.lseek(1, 0, os.SEEK_SET)  # the worker's descriptors share this position


def _reap() -> dict[int, int]:
    """Return the wait statuses, by process id, of all children that have ended, without waiting for others.

    Raises:
        ChildProcessError: there is no child at all, neither before nor after.
    """
    statuses: dict[int, int] = {}
    try:
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            statuses[ended[0]] = ended[1]
    except ChildProcessError:
        if not statuses:
            raise
    return statuses


def _end_descendants() -> tuple[dict[int, int], tuple[int, ...]]:
    """Kill and reap children until there is none; return wait statuses, and the ids of those that could not be ended.

    Children are enough: what they leave becomes a child of this process. A process that forks and exits forever is never in a list
    of what runs, but it is a child or about to be one, so only ECHILD says that nothing is left. A signal to its group misses none.
    Gives up after 30 s: a process stuck in a driver dies when the driver lets go.
    """
    statuses: dict[int, int] = {}
    tried: set[int] = set()
    deadline = time.monotonic() + _END_S
    while time.monotonic() < deadline:
        try:
            statuses |= _reap()
        except ChildProcessError:
            return statuses, ()
        children = _children()
        for child in children:
            _kill(child)
        if tried >= children:
            time.sleep(_PAUSE_S)
        tried |= children
    return statuses, tuple(process.pid for process in psutil.Process().children(recursive=True))


def _children() -> set[int]:
    """Return the ids of this process's children, without a walk over all processes where the kernel lists them."""
    try:
        listed = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    except FileNotFoundError:
        return {child.pid for child in psutil.Process().children()}
    return set(map(int, listed.split()))


def _kill(child: int) -> None:
    """Send SIGKILL to a child that has not been reaped, and so still owns its id, and to its process group."""
    with contextlib.suppress(ProcessLookupError):
        if (group := os.getpgid(child)) != os.getpgrp():
            os.killpg(group, signal.SIGKILL)
        os.kill(child, signal.SIGKILL)


def _count_killed(statuses: dict[int, int]) -> int:
    return sum(os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL for status in statuses.values())


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
