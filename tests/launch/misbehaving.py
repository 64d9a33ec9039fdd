"""Steps that misbehave, each in one way, and what a record must say of it. Standard library only.

`step` is the factory that a case names; what it returns misbehaves in its first call.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import ctypes
import faulthandler
import fcntl
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

Act = Callable[[], None]


@dataclass(frozen=True)
class Misbehaviour:
    """A way to misbehave, and what the one record must say."""

    act: Act
    outcomes: tuple[str, ...]
    """Kinds of failure of which one is right; "ok" is a good record."""
    words: str
    """What message or detail must contain."""
    timeout_s: float


MISBEHAVIOURS: dict[str, Misbehaviour] = {}
_FOREVER = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
_SURROGATE = "\ud800"
_MEGABYTE = 1 << 20


def gives(*outcomes: str, words: str = "", timeout_s: float = 60.0) -> Callable[[Act], Act]:
    """Declare a misbehaviour by its function."""

    def declare(act: Act) -> Act:
        MISBEHAVIOURS[act.__name__] = Misbehaviour(act, outcomes, words, timeout_s)
        return act

    return declare


def step(name: str) -> Act:
    """Return a step that misbehaves once."""
    left = [MISBEHAVIOURS[name].act]
    return lambda: left.pop()() if left else None


# What is raised.


@gives("error", words="ValueError: first")
def raises_with_a_cyclic_cause() -> None:
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    raise first


@gives("error", words="ValueError: first")
def raises_with_a_cyclic_context() -> None:
    first, second = ValueError("first"), ValueError("second")
    first.__context__, second.__context__ = second, first
    raise first


@gives("error", words="ValueError: last")
def raises_with_a_hundred_thousand_causes() -> None:
    error: BaseException | None = None
    for number in range(100_000):
        following = ValueError(number)
        following.__cause__, error = error, following
    raise ValueError("last") from error


@gives("error", words="ExceptionGroup")
def raises_nested_groups() -> None:
    error: Exception = ValueError("innermost")
    for _ in range(2000):
        error = ExceptionGroup("group", [error])
    raise error


@gives("error", words="\\ud800")
def raises_a_lone_surrogate() -> None:
    raise ValueError(_SURROGATE)


@gives("error", words="\\ud800")
def raises_with_a_surrogate_in_a_note() -> None:
    error = ValueError("noted")
    error.add_note(_SURROGATE * 10_000)
    raise error


class _UnspeakableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")

    __repr__ = __str__


class _QuitsError(Exception):
    def __str__(self) -> str:
        raise SystemExit(0)


class _NotTextError(Exception):
    def __str__(self) -> str:
        return 5  # type: ignore[return-value]


class _EndlessError(Exception):
    def __str__(self) -> str:
        while True:
            pass


class _DisguisedError(Exception):
    @property  # type: ignore[misc]
    def __class__(self) -> type:
        raise RuntimeError("no class")


class _OwnBaseError(BaseException):
    pass


@gives("error", words="_UnspeakableError")
def raises_what_cannot_be_printed() -> None:
    raise _UnspeakableError


@gives("error", words="_QuitsError")
def raises_what_quits_when_printed() -> None:
    raise _QuitsError


@gives("error", words="_NotTextError")
def raises_what_prints_no_text() -> None:
    raise _NotTextError


@gives("timeout", timeout_s=1.5)
def raises_what_prints_forever() -> None:
    raise _EndlessError


@gives("error", words="_DisguisedError")
def raises_what_hides_its_class() -> None:
    raise _DisguisedError("hidden")


@gives("error", words="_OwnBaseError: below Exception")
def raises_a_base_exception() -> None:
    raise _OwnBaseError("below Exception")


@gives("error", words="CancelledError")
def raises_a_cancellation() -> None:
    raise asyncio.CancelledError


@gives("error", words="GeneratorExit")
def raises_generator_exit() -> None:
    raise GeneratorExit


@gives("error", words="characters")
def raises_fifty_megabytes() -> None:
    raise ValueError("x" * 50 * _MEGABYTE)


@gives("out_of_memory", words="characters")
def runs_out_of_memory_in_fifty_megabytes() -> None:
    raise MemoryError("x" * 50 * _MEGABYTE)


@gives("error", words="ModuleNotFoundError")
def misses_a_module_whose_name_is_no_text() -> None:
    raise ModuleNotFoundError("which?", name=5)  # type: ignore[arg-type]


@gives("crash", words="sys.exit")
def exits_with_what_cannot_be_printed() -> None:
    sys.exit(_UnspeakableError())  # type: ignore[arg-type]


@gives("crash", words="sys.exit")
def exits_with_fifty_megabytes() -> None:
    sys.exit("x" * 50 * _MEGABYTE)


@gives("error", words="RecursionError")
def recurses() -> None:
    recurses()


@gives("error", words="Interrupted by a timer")
def is_interrupted_by_a_timer() -> None:
    def interrupt(*_: object) -> NoReturn:
        signal.setitimer(signal.ITIMER_REAL, 0)
        raise TimeoutError("Interrupted by a timer")

    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    time.sleep(600)


@gives("error", words="_OwnBaseError")
def is_interrupted_by_a_thread() -> None:
    main, raise_in = ctypes.c_ulong(threading.get_ident()), ctypes.pythonapi.PyThreadState_SetAsyncExc
    threading.Timer(0.05, lambda: raise_in(main, ctypes.py_object(_OwnBaseError))).start()
    while True:
        time.sleep(0.01)


# How it ends.


@gives("crash", words="exit code 0")
def ends_at_once() -> None:
    os._exit(0)


@gives("crash", words="exit code 4")
def ends_in_a_thread() -> None:
    threading.Thread(target=lambda: os._exit(4)).start()
    time.sleep(600)


@gives("crash", words="SIGABRT")
def aborts() -> None:
    os.abort()


@gives("crash", words="SIGSEGV")
def reads_address_zero() -> None:
    ctypes.string_at(0)


@gives("crash", words="SIGSEGV")
def overflows_the_stack() -> None:
    faulthandler._stack_overflow()  # type: ignore[attr-defined]


@gives("crash", words="SIGSEGV")
def reads_address_zero_in_a_thread() -> None:
    threading.Thread(target=lambda: ctypes.string_at(0)).start()
    time.sleep(600)


@gives("killed", words="SIGKILL")
def kills_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@gives("crash", words="SIGTERM")
def terminates_itself() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(600)


@gives("timeout", timeout_s=1.5)
def stops_itself() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


@gives("killed", words="SIGKILL")
def kills_its_session() -> None:
    os.killpg(0, signal.SIGKILL)


@gives("crash", words="exit code 0")
def becomes_another_program() -> None:
    os.execv("/bin/true", ["true"])


@gives("timeout", timeout_s=1.5)
def becomes_a_program_that_hangs() -> None:
    os.execv("/bin/sleep", ["sleep", "600"])


@gives("crash", words="Timeout")
def ends_by_a_watchdog() -> None:
    faulthandler.dump_traceback_later(0.1, exit=True)
    time.sleep(600)


@gives("crash", words="SIGXCPU")
def exceeds_its_processor_time() -> None:
    used = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))
    resource.setrlimit(resource.RLIMIT_CPU, (used + 1, used + 600))
    while True:
        pass


# How it hangs.


@gives("timeout", words="most recent call first", timeout_s=1.5)
def hangs() -> None:
    time.sleep(600)


@gives("timeout", timeout_s=1.5)
def hangs_with_every_signal_blocked() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, range(1, signal.NSIG))
    time.sleep(600)


@gives("timeout", timeout_s=1.5)
def hangs_holding_the_interpreter() -> None:
    re.match(r"(a+)+$", "a" * 100 + "b")


@gives("timeout", timeout_s=1.5)
def dies_of_the_question_where_it_hangs() -> None:
    faulthandler.unregister(signal.SIGUSR1)
    time.sleep(600)


@gives("ok")
def leaves_threads_that_never_end() -> None:
    for _ in range(8):
        threading.Thread(target=time.sleep, args=(600,)).start()


@gives("ok")
def leaves_exit_handlers_that_hang() -> None:
    atexit.register(time.sleep, 600)


# What it does to descriptors.


def _events() -> Iterator[int]:
    """Pipes that this process can write to: the events are one of them."""
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            fd = int(entry.name)
            writable = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
            if fd > 2 and writable and str(entry.readlink()).startswith("pipe:"):
                yield fd


def _forge(line: bytes) -> None:
    for fd in _events():
        rest = memoryview(line)
        while rest:
            rest = rest[os.write(fd, rest) :]


@gives("crash", words="exit code 1")
def closes_every_descriptor() -> None:
    os.closerange(0, 4096)


@gives("crash", words="closed")
def closes_the_events() -> None:
    for fd in [*_events()]:
        os.close(fd)


@gives("crash", words="closed")
def puts_a_file_in_the_place_of_the_events() -> None:
    for fd in [*_events()]:
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), fd)


@gives("ok")
def makes_the_events_nonblocking() -> None:
    for fd in _events():
        os.set_blocking(fd, False)


@gives("ok")
def closes_stdin_stdout_and_stderr() -> None:
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.close()


@gives("ok")
def closes_the_descriptors_of_output() -> None:
    print("buffered", end="")
    os.closerange(0, 3)


@gives("ok")
def replaces_stdout_by_what_is_no_stream() -> None:
    sys.stdout = sys.stderr = object()


@gives("ok")
def leaves_a_flush_that_blocks() -> None:
    read, write = os.pipe()
    os.dup2(read, 100)  # stays open, and nobody reads
    os.set_blocking(write, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write, b"x")
    os.set_blocking(write, True)
    sys.stdout = open(write, "w")  # noqa: PTH123, SIM115
    sys.stdout.write("waits")


@gives("crash", words="is not an event")
def writes_garbage_to_the_events() -> None:
    _forge(b"\xff\x00 garbage\n")


@gives("crash", words="is not an event")
def writes_half_an_event_and_ends() -> None:
    _forge(b'{"event":"finished","record":{"case":')
    os._exit(0)


@gives("crash", words="longer than")
def writes_a_line_without_end_to_the_events() -> None:
    for _ in range(100):
        _forge(b"x" * _MEGABYTE)


@gives("crash", words="is not an event")
def writes_two_million_lines_to_the_events() -> None:
    _forge(b"x\n" * 2_000_000)


@gives("timeout", timeout_s=2)
def reports_phases_without_end() -> None:
    while True:
        _forge(b'{"event":"phase","name":"import"}\n{"event":"phase","name":"start"}\n' * 100)


@gives("crash")
def reports_its_own_exit() -> None:
    _forge(b'{"event":"exited","code":0,"signal":null,"leftovers":0}\n')
    time.sleep(600)


@gives("ok")
def prints_two_hundred_megabytes() -> None:
    for _ in range(200):
        os.write(1, b"x" * _MEGABYTE)


@gives("timeout", timeout_s=3)
def prints_without_end() -> None:
    while True:
        os.write(1, b"x" * _MEGABYTE)


# What it starts.


@gives("ok")
def leaves_a_child_that_ignores_signals() -> None:
    if os.fork() == 0:
        os.setsid()
        for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_IGN)
        time.sleep(600)
        os._exit(0)


@gives("ok")
def leaves_a_stopped_child() -> None:
    os.kill(subprocess.Popen(_FOREVER, start_new_session=True).pid, signal.SIGSTOP)


@gives("ok")
def leaves_a_hundred_children() -> None:
    for _ in range(100):
        if os.fork() == 0:
            os.setsid()
            time.sleep(600)
            os._exit(0)


@gives("ok")
def leaves_a_pool() -> None:
    pool = multiprocessing.get_context("fork").Pool(2)
    pool.apply_async(time.sleep, (600,))
    globals()["_pool"] = pool


def _fork_forever(*, own_session: bool) -> None:
    if os.fork() == 0:
        os.closerange(0, 64)
        while True:
            if own_session:
                os.setsid()
            if os.fork():
                os._exit(0)


@gives("ok")
def leaves_a_child_that_forks_and_exits_forever() -> None:
    _fork_forever(own_session=False)


@gives("ok")
def leaves_a_child_that_forks_into_new_sessions_forever() -> None:
    for _ in range(4):
        _fork_forever(own_session=True)


@gives("ok")
def forks_a_child_that_returns() -> None:
    os.fork()


@gives("crash", words="exit code 0")
def becomes_a_daemon() -> None:
    if os.fork():
        os._exit(0)
    os.setsid()
    if os.fork():
        os._exit(0)
    time.sleep(600)


@gives("ok")
def adopts_orphans() -> None:
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
    orphaning = f"import subprocess; subprocess.Popen({_FOREVER!r}, start_new_session=True)"
    subprocess.run([sys.executable, "-S", "-c", orphaning], check=True)


# What it does to those above it.


def _above() -> tuple[int, int]:
    """The supervisor, and the guard above it."""
    supervisor = os.getppid()
    return supervisor, int(Path(f"/proc/{supervisor}/stat").read_text().rpartition(")")[2].split()[1])


def _with_children(act: Callable[[int, int], None]) -> None:
    subprocess.Popen(_FOREVER, start_new_session=True)
    if os.fork() == 0:
        os.setsid()
        time.sleep(600)
        os._exit(0)
    act(*_above())


@gives("killed", "crash", words="supervisor")
def kills_its_supervisor() -> None:
    _with_children(lambda supervisor, _: os.kill(supervisor, signal.SIGKILL))
    time.sleep(600)


@gives("killed", "crash", words="supervisor")
def outlives_its_supervisor() -> None:
    ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)  # no signal at its parent's death
    _with_children(lambda supervisor, _: os.kill(supervisor, signal.SIGKILL))
    time.sleep(600)


@gives("ok")
def stops_its_supervisor() -> None:
    _with_children(lambda supervisor, _: os.kill(supervisor, signal.SIGSTOP))


@gives("ok")
def kills_the_guard() -> None:
    _with_children(lambda _, guard: os.kill(guard, signal.SIGKILL))


@gives("ok")
def stops_the_guard() -> None:
    _with_children(lambda _, guard: os.kill(guard, signal.SIGSTOP))


@gives("timeout", timeout_s=2)
def stops_its_supervisor_and_hangs() -> None:
    _with_children(lambda supervisor, _: os.kill(supervisor, signal.SIGSTOP))
    time.sleep(600)


# What it does to the process.


@gives("ok", "error", "crash")
def allows_no_more_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))


@gives("out_of_memory", "error", "crash")
def allows_no_more_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (1 << 20, 1 << 20))
    bytearray(64 << 20)


@gives("error", words="File too large")
def allows_no_files_of_any_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    sys.stdout.write("no room")


@gives("ok", "error", "crash")
def removes_its_working_directory() -> None:
    folder = tempfile.mkdtemp()
    os.chdir(folder)
    Path(folder).rmdir()


@gives("ok")
def clears_its_environment() -> None:
    os.environ.clear()


@gives("error", words="RecursionError")
def allows_no_recursion() -> None:
    sys.setrecursionlimit(len_of_stack() + 5)
    recurses()


def len_of_stack() -> int:
    """Frames of the caller's stack."""
    frame: Any = sys._getframe()
    depth = 0
    while frame is not None:
        frame, depth = frame.f_back, depth + 1
    return depth


@gives("error", "crash")
def clears_the_modules() -> None:
    sys.modules.clear()
