"""The line between a launcher and one worker: the job goes in, events and the record come out, on their own file descriptors.

It starts no process and judges nothing.
"""

from __future__ import annotations

import contextlib
import os
import select
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import msgspec

from hpc_core.launch.supervisor import TIMED_OUT
from hpc_core.record.job import Event, Exited, Finished, Job, Phase, decode_event
from hpc_core.record.record import Record

_TAIL_CHARACTERS = 4000
_TAIL_BYTES = 4 * _TAIL_CHARACTERS  # a character of UTF-8 has up to four bytes
_END_LIMIT_S = 40.0  # the supervisor itself gives up after 30 s
_LONGEST_POLL_S = 3600.0  # poll counts milliseconds in 32 bits


@dataclass
class Observed:
    """What the launcher observed of one worker."""

    phase: str = "import"
    """The last phase it entered; until it reports one, its interpreter is still importing."""
    record: Record | None = None
    exited: Exited | None = None
    malformed: str | None = None
    """The first line that was not an event, and why."""
    limit_s: float | None = None
    """The limit that ran out, if one did."""


class Channel:
    """A context manager over the descriptors of one worker; none of them outlives it.

    `job_fd`, `events_write_fd`, `life_read_fd` and `output_fd` are for the supervisor, the rest is the launcher's.
    """

    def __init__(self, job: Job) -> None:
        self._files = contextlib.ExitStack()
        job_file = self._files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - the stack closes it
        job_file.write(msgspec.json.encode(job))
        job_file.flush()
        job_file.seek(0)
        # A file, not a pipe: nobody needs to read it while the worker writes, and a flood of output blocks nobody.
        output = self._files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        self.job_fd = job_file.fileno()
        self.output_fd = output.fileno()
        self._events_read_fd, self.events_write_fd = os.pipe()
        self.life_read_fd, self._life_write_fd = os.pipe()
        self._open = {self._events_read_fd, self.events_write_fd, self.life_read_fd, self._life_write_fd}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for fd in tuple(self._open):
            self._close(fd)
        self._files.close()

    def _close(self, fd: int) -> None:
        if fd in self._open:
            self._open.remove(fd)
            os.close(fd)

    @property
    def for_supervisor(self) -> tuple[int, int, int, int]:
        """Descriptors of job, events, life and output, in the order in which they travel."""
        return self.job_fd, self.events_write_fd, self.life_read_fd, self.output_fd

    def hand_over(self) -> None:
        """Close the supervisor's ends, once it has them: the events then end when all its processes have ended."""
        self._close(self.events_write_fd)
        self._close(self.life_read_fd)

    def follow(self, *, timeout_s: float, import_limit_s: float, on_event: Callable[[Event], None]) -> Observed:
        """Read events until the worker and everything it started has ended; end them when a limit runs out.

        Args:
            timeout_s: wall-clock seconds for all phases but "import".
            import_limit_s: seconds until the first phase, and for each phase "import".
            on_event: called with every event. What it raises leaves here, like Ctrl-C, after the worker has been ended.
        """
        observed = Observed()
        try:
            self._read_events(_Clock(timeout_s, import_limit_s), observed, on_event)
        finally:
            if observed.exited is None:
                self._end_and_wait()
        return observed

    def _read_events(self, clock: _Clock, observed: Observed, on_event: Callable[[Event], None]) -> None:
        lines = _Lines(self._events_read_fd)
        give_up = float("inf")
        while observed.exited is None and time.monotonic() < give_up:
            if observed.limit_s is None and clock.left_s() <= 0:
                observed.limit_s = clock.limit_s
                self._end(TIMED_OUT)
                give_up = time.monotonic() + _END_LIMIT_S
            batch = lines.read(clock.left_s() if observed.limit_s is None else give_up - time.monotonic())
            if batch is None:
                return
            for event in _decoded(batch, observed):
                if isinstance(event, Phase):
                    observed.phase = event.name
                    clock.enter(event.name)
                elif isinstance(event, Finished):
                    observed.record = event.record
                else:
                    observed.exited = event
                on_event(event)

    def _end(self, message: bytes = b"") -> None:
        """Tell the supervisor to end everything. May be called again."""
        if self._life_write_fd in self._open:
            if message:
                with contextlib.suppress(BrokenPipeError):  # it has ended by itself
                    os.write(self._life_write_fd, message)
            self._close(self._life_write_fd)

    def _end_and_wait(self) -> None:
        """End the worker and wait until the events end, when not even the supervisor is left. At most 40 s."""
        self._end()
        lines = _Lines(self._events_read_fd)
        deadline = time.monotonic() + _END_LIMIT_S
        while (left_s := deadline - time.monotonic()) > 0:
            if lines.read(left_s) is None:
                return

    def output_tail(self) -> str:
        """Return the last 4000 characters that worker and supervisor wrote to stdout and stderr."""
        size = os.fstat(self.output_fd).st_size
        start = max(0, size - _TAIL_BYTES)
        return os.pread(self.output_fd, _TAIL_BYTES, start).decode("utf-8", "replace")[-_TAIL_CHARACTERS:].strip()


class _Clock:
    """The time a worker has left: one allowance for imports, and the case's timeout for everything else together."""

    def __init__(self, timeout_s: float, import_limit_s: float) -> None:
        self._timeout_s = timeout_s
        self._import_limit_s = import_limit_s
        self._left_s = timeout_s
        self._entered = time.monotonic()
        self._importing = True  # until the worker reports a phase, its interpreter is starting

    def enter(self, phase: str) -> None:
        now = time.monotonic()
        if not self._importing:
            self._left_s -= now - self._entered
        if not (self._importing and phase == "import"):  # starting and importing share one allowance
            self._entered = now
        self._importing = phase == "import"

    @property
    def limit_s(self) -> float:
        """The limit that applies now."""
        return self._import_limit_s if self._importing else self._timeout_s

    def left_s(self) -> float:
        return (self._import_limit_s if self._importing else self._left_s) - (time.monotonic() - self._entered)


class _Lines:
    """Lines from a descriptor."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._rest = b""
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)

    def read(self, wait_s: float) -> list[bytes] | None:
        """Return the complete lines that came within the wait, perhaps none; None at the end of the events."""
        if not self._poll.poll(min(max(0.0, wait_s), _LONGEST_POLL_S) * 1000):
            return []
        chunk = os.read(self._fd, 1 << 16)
        if not chunk:
            return None
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        return [line for line in lines if line]


def _decoded(lines: list[bytes], observed: Observed) -> Iterator[Event]:
    for line in lines:
        try:
            yield decode_event(line)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            observed.malformed = observed.malformed or f"{line[:200]!r}: {error}"
