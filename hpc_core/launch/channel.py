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

from hpc_core.launch.family import kill_all, writers
from hpc_core.launch.supervisor import TIMED_OUT
from hpc_core.record.job import Event, Exited, Finished, Job, Phase, decode_event
from hpc_core.record.record import Record

_TAIL_CHARACTERS = 4000
_TAIL_BYTES = 4 * _TAIL_CHARACTERS  # a character of UTF-8 has up to four bytes
_END_LIMIT_S = 40.0  # the supervisor itself gives up after 30 s
_AFTER_RECORD_S = 30.0
"""Seconds for a worker to end after its record: nothing but a flush of its output and the kernel's work is left."""
_AFTER_EXIT_S = 5.0
_LONGEST_LINE_BYTES = 1 << 26
_LONGEST_POLL_S = 3600.0  # poll counts milliseconds in 32 bits


@dataclass
class Observed:
    """What the launcher observed of one worker."""

    phase: str = "import"
    """The last phase it entered; until it reports one, its interpreter is still importing."""
    record: Record | None = None
    exited: Exited | None = None
    malformed: str | None = None
    """What the first line was that was not an event, or no event of its own, as a clause."""
    limit_s: float | None = None
    """The limit that ran out, if one did."""
    alive: tuple[int, ...] = ()
    """Ids of the worker's processes that could not be ended."""


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
        lines = _Lines(self._events_read_fd)
        try:
            self._read_events(lines, _Clock(timeout_s, import_limit_s), observed, on_event)
        finally:
            self._end_and_wait(lines, observed)
        return observed

    def _read_events(self, lines: _Lines, clock: _Clock, observed: Observed, on_event: Callable[[Event], None]) -> None:
        """Read until the worker has ended or a limit has run out."""
        while observed.exited is None:
            if clock.left_s() <= 0:
                observed.limit_s = clock.limit_s
                self._end(TIMED_OUT)
                return
            batch = lines.read(clock.left_s())
            if batch is None:
                return
            for event in _decoded(batch, observed):
                if isinstance(event, Phase):
                    observed.phase = event.name
                    clock.enter(event.name)
                elif isinstance(event, Finished):
                    clock.finish()
                _observe(event, observed)
                on_event(event)

    def _end(self, message: bytes = b"") -> None:
        """Tell the supervisor to end everything. May be called again."""
        if self._life_write_fd in self._open:
            if message:
                with contextlib.suppress(BrokenPipeError):  # it has ended by itself
                    os.write(self._life_write_fd, message)
            self._close(self._life_write_fd)

    def _end_and_wait(self, lines: _Lines, observed: Observed) -> None:
        """End the worker and wait until the events end, when not even the supervisor is left; end by force what does not.

        At most 45 s; what is left even then is named in `observed`.
        """
        self._end()
        if self._ends_within(_END_LIMIT_S if observed.exited is None else _AFTER_EXIT_S, lines, observed):
            return
        kill_all(family := writers(self._events_read_fd))
        if not self._ends_within(_AFTER_EXIT_S, lines, observed):
            observed.alive = tuple(process.pid for process in family if process.is_running())

    def _ends_within(self, limit_s: float, lines: _Lines, observed: Observed) -> bool:
        """Read what still comes; return whether nobody is left who could write."""
        deadline = time.monotonic() + limit_s
        while (left_s := deadline - time.monotonic()) > 0:
            batch = lines.read(left_s)
            if batch is None:
                return True
            for event in _decoded(batch, observed):
                _observe(event, observed)
        return False

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
        self._left_s = {True: import_limit_s, False: timeout_s}
        self._entered = time.monotonic()
        self._importing = True  # until the worker reports a phase, its interpreter is starting

    def enter(self, phase: str) -> None:
        now = time.monotonic()
        self._left_s[self._importing] -= now - self._entered
        self._entered = now
        self._importing = phase == "import"

    def finish(self) -> None:
        """The record is there: what is left to do takes no time of the case's."""
        self.enter("")
        self._left_s[False] = min(self._left_s[False], _AFTER_RECORD_S)

    @property
    def limit_s(self) -> float:
        """The limit that applies now."""
        return self._import_limit_s if self._importing else self._timeout_s

    def left_s(self) -> float:
        return self._left_s[self._importing] - (time.monotonic() - self._entered)


class _Lines:
    """Lines from a descriptor."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._rest: list[bytes] = []
        self._rest_bytes = 0
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)

    def read(self, wait_s: float) -> list[bytes] | None:
        """Return the complete lines that came within the wait, perhaps none; None at the end of the events.

        Of a line that is too long for an event, only the beginning is returned.
        """
        if not self._poll.poll(min(max(0.0, wait_s), _LONGEST_POLL_S) * 1000):
            return []
        chunk = os.read(self._fd, 1 << 16)
        if not chunk:
            return None
        *lines, rest = chunk.split(b"\n")
        if lines:
            lines[0] = b"".join((*self._rest, lines[0]))
            self._rest, self._rest_bytes = [], 0
        if self._rest_bytes <= _LONGEST_LINE_BYTES:
            self._rest.append(rest)
            self._rest_bytes += len(rest)
        return [line for line in lines if line]


def _decoded(lines: list[bytes], observed: Observed) -> Iterator[Event]:
    for line in lines:
        if observed.malformed is not None and b'"exited"' not in line:
            continue  # only the supervisor's report still counts
        try:
            yield decode_event(line)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            why = f"longer than {_LONGEST_LINE_BYTES >> 20} MiB" if len(line) > _LONGEST_LINE_BYTES else str(error)
            observed.malformed = observed.malformed or f"a line from the worker is not an event ({line[:200]!r}: {why})"


def _observe(event: Event, observed: Observed) -> None:
    """Keep what an event says. A worker has one record and one end, so a second one shows that the code under test wrote one."""
    if isinstance(event, Finished):
        if observed.record is not None:
            observed.malformed = observed.malformed or "the worker sent two records"
        observed.record = event.record
    elif isinstance(event, Exited):
        if observed.exited is not None:
            observed.malformed = observed.malformed or "the worker's end was reported twice"
        observed.exited = event
