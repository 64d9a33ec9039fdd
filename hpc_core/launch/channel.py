"""What connects a launcher with one worker: job, events, life and output. Knows descriptors, but starts nothing."""

from __future__ import annotations

import contextlib
import os
import tempfile
from types import TracebackType
from typing import Self

import msgspec

from hpc_core.record.job import Job

__all__ = ["Channel"]

_TAIL_CHARACTERS = 4000
_TAIL_BYTES = 4 * _TAIL_CHARACTERS
"""A character of UTF-8 has up to four bytes."""


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
        self.events_read_fd, self.events_write_fd = os.pipe()
        self.life_read_fd, self._life_write_fd = os.pipe()
        self._open = {self.events_read_fd, self.events_write_fd, self.life_read_fd, self._life_write_fd}

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

    def handed_over(self) -> None:
        """The supervisor has its descriptors: from now on the end of all its processes is the end of the events."""
        self._close(self.events_write_fd)
        self._close(self.life_read_fd)

    def end(self, word: bytes = b"") -> None:
        """Tell the supervisor to end everything, with a word first if there is one to say. May be called again."""
        if self._life_write_fd in self._open:
            if word:
                with contextlib.suppress(BrokenPipeError):  # it ended by itself
                    os.write(self._life_write_fd, word)
            self._close(self._life_write_fd)

    def output_tail(self) -> str:
        """The last 4000 characters that worker and supervisor wrote to stdout and stderr."""
        size = os.fstat(self.output_fd).st_size
        start = max(0, size - _TAIL_BYTES)
        return os.pread(self.output_fd, _TAIL_BYTES, start).decode("utf-8", "replace")[-_TAIL_CHARACTERS:].strip()
