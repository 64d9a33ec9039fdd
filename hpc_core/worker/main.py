"""One job in, one record out: `python -m hpc_core.worker --job-fd N --events-fd M`.

Turns whatever happens while a case runs into a record. Knows neither models nor measuring (`hpc_core.worker.perform` does),
nor how it was started. Events go to their own descriptor, never to stdout, which belongs to the code under test.
"""

from __future__ import annotations

import argparse
import datetime
import faulthandler
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

import msgspec

from hpc_core.case.errors import HpcCoreError, MissingDataError, MissingLibraryError, install_command
from hpc_core.record import environment
from hpc_core.record.exceptions import message_of, traceback_of, with_causes
from hpc_core.record.job import (
    Event,
    Finished,
    Job,
    Phase,
    Predict,
    encode_event,
)
from hpc_core.record.record import (
    Failure,
    FailureKind,
    Record,
    record_to_json,
)

_RECURSION = 1000  # Python's own
_NO_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Parts of torch's plain RuntimeErrors that mean that the host's allocator or a CUDA library is out of memory."""


class _Progress:
    """Forward events, and keep the current phase and the seconds of each phase for the record of a failure."""

    def __init__(self, emit: Callable[[Event], None]) -> None:
        self._emit = emit
        self._entered = time.monotonic()
        self.phase = "start"
        self.phase_s: dict[str, float] = {}
        self.started_at = datetime.datetime.now(datetime.UTC)

    def emit(self, event: Event) -> None:
        if isinstance(event, Phase):
            self.settle()
            self.phase = event.name
        self._emit(event)

    def settle(self) -> None:
        now = time.monotonic()
        self.phase_s[self.phase] = round(self.phase_s.get(self.phase, 0.0) + now - self._entered, 4)
        self._entered = now


def run_job(job: Job, emit: Callable[[Event], None], *, debug: bool = False) -> Record:
    """Run a job; an exception becomes a failed record. With `debug`, exceptions are raised instead, for a debugger.

    Emits the phase "import" while `hpc_core.worker.perform` is imported, "start" after it, and then what the run itself emits.
    The working directory becomes importable, unless Python runs in safe-path mode.
    """
    _make_folder_importable()
    progress = _Progress(emit)
    try:
        progress.emit(Phase("import"))
        began = time.perf_counter()
        perform = _half(job)
        progress.emit(Phase("start"))
        record = perform(job, progress.emit, began=began)
        record_to_json(record)  # what JSON cannot hold fails here, where it can still be reported
        return record
    # Only here, every exception becomes a record: a case runs other people's code, and an exception of it is one row of
    # the report. This includes SystemExit and KeyboardInterrupt, because a factory may call sys.exit.
    except BaseException as error:
        if debug:
            raise
        sys.setrecursionlimit(max(sys.getrecursionlimit(), _RECURSION))  # the code under test may have left too little
        return _failed(job, progress, error)


def _half(job: Job) -> Callable[..., Record]:
    """Import and return the function that performs this job. It imports torch, which takes seconds."""
    if isinstance(job.kind, Predict):
        from hpc_core.predict.shim import load

        load()  # before torch is imported
        from hpc_core.predict.perform import predict

        return predict
    from hpc_core.worker.perform import perform

    return perform


def _make_folder_importable() -> None:
    folder = os.getcwd()  # noqa: PTH109 - sys.path holds strings
    if not sys.flags.safe_path and folder not in sys.path and "" not in sys.path:
        sys.path.insert(0, folder)


def _failed(job: Job, progress: _Progress, error: BaseException) -> Record:
    progress.settle()
    kind, message = _diagnosis(job, error)
    wants_gpu = job.device == "auto" and job.case.scale != "tiny" and bool(environment.visible_gpus())
    on_gpu = job.device == "cuda" or wants_gpu
    around = environment.circumstances(
        "cuda" if on_gpu else "cpu",
        job.launched,
        ceilings=job.ceilings,
        fault=job.fault,
        started_at=progress.started_at,
        phase_s=progress.phase_s,
    )
    failure = Failure(kind=kind, message=message, phase=progress.phase, detail=traceback_of(error))
    return Record(case=job.case, status="failed", failure=failure, circumstances=around)


def _diagnosis(job: Job, error: BaseException) -> tuple[FailureKind, str]:
    """Return kind and message of the exception. Uses its type, because an exception can make `isinstance` lie."""
    kind, text = type(error), message_of(error)
    if (shortage := _shortage(error)) is not None:
        return (
            "out_of_memory",
            f"{shortage} Lower batch or length, turn checkpointing on, or take a device with more memory.",
        )
    if issubclass(kind, MissingLibraryError):
        return "missing_library", text
    if issubclass(kind, MissingDataError):
        return "missing_data", text
    missing = str(getattr(error, "name", "")).partition(".")[0] if issubclass(kind, ModuleNotFoundError) else ""
    if (command := install_command(missing)) is not None:
        return "missing_library", f"{missing} is not installed: {command}."
    if issubclass(kind, HpcCoreError):
        return "refused", text
    if issubclass(kind, KeyboardInterrupt):
        return "interrupted", f"{job.case.id} was interrupted before it had numbers; run it again."
    if issubclass(kind, SystemExit):
        return (
            "crash",
            f"The code under test called sys.exit({text}); a step must return, or raise what is wrong.",
        )
    return "error", f"{kind.__name__}: {text}"


def _shortage(error: BaseException) -> str | None:
    """Return the message of an out-of-memory error, with its numbers; None for another error. Checks causes too."""
    for at in with_causes(error):
        names = {f"{kind.__module__}.{kind.__name__}" for kind in type(at).__mro__}
        # By name, because a case without torch must not pay for importing it.
        torch_says = any(name.startswith("torch.") and name.endswith(".OutOfMemoryError") for name in names)
        text = message_of(at)
        if torch_says or (issubclass(type(at), RuntimeError) and any(sign in text for sign in _NO_MEMORY)):
            return f"{text.rstrip('.')}."
        if issubclass(type(at), MemoryError):
            return f"The host ran out of memory: {'an allocation failed' if text == type(at).__name__ else text}."
    return None


def serve(job_fd: int, events_fd: int) -> NoReturn:
    """Read one job, run it, write its events and its record, end this process."""
    code = 1
    try:
        os.set_inheritable(events_fd, False)  # no program started from here holds the launcher's line open
        faulthandler.enable(2, all_threads=True)  # a crash shows where it happened
        faulthandler.register(
            signal.SIGUSR1, 2, all_threads=True
        )  # the supervisor asks before it ends a worker that hangs
        with os.fdopen(job_fd, "rb") as job_file:
            job = msgspec.json.decode(job_file.read(), type=Job)
        emit = _Events(events_fd)
        emit(Finished(run_job(job, emit)))
        code = 0
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        # Neither exit handlers nor threads of the code under test can hold up, or crash, a worker whose record is out.
        os._exit(code)


class _Events:
    """Write events to their descriptor, from this process only, while the code under test has not closed it."""

    def __init__(self, fd: int) -> None:
        self._fd, self._pid, self._pipe = fd, os.getpid(), os.fstat(fd)

    def __call__(self, event: Event) -> None:
        """Write an event.

        Raises:
            OSError: the descriptor was closed, or now refers to another file.
        """
        if os.getpid() != self._pid:
            sys.stderr.write("A child that the code under test forked returned into hpc-core's code, and was ended.\n")
            os._exit(1)
        try:
            now = os.fstat(self._fd)
        except OSError:
            now = None
        if now is None or not os.path.samestat(now, self._pipe):
            raise OSError(f"The code under test closed descriptor {self._fd}, which a worker reports its record on.")
        rest = memoryview(encode_event(event))
        while rest:
            rest = rest[self._write(rest) :]

    def _write(self, line: memoryview) -> int:
        try:
            return os.write(self._fd, line)
        except BlockingIOError:  # the code under test made it non-blocking
            os.set_blocking(self._fd, True)
            return 0


def main(arguments: list[str] | None = None) -> NoReturn:
    """Serve the job of the given descriptors."""
    parser = argparse.ArgumentParser(prog="python -m hpc_core.worker", description=__doc__)
    parser.add_argument("--job-fd", type=int, required=True, help="one Job as JSON")
    parser.add_argument("--events-fd", type=int, required=True, help="one event a line as JSON")
    chosen = parser.parse_args(arguments)
    serve(chosen.job_fd, chosen.events_fd)
