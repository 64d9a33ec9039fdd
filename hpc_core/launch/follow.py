"""Following one worker by its events until nothing of it is left. Knows clocks and lines; judges and starts nothing."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec

from hpc_core.launch.channel import Channel
from hpc_core.launch.supervisor import TIMED_OUT
from hpc_core.record.job import (
    Event,
    Exited,
    Finished,
    Phase,
    decode_event,
)
from hpc_core.record.record import Record

__all__ = ["Seen", "follow"]

_GONE_S = 40.0
"""How long ending a worker may take: the supervisor itself gives up after 30 s."""
_IMPORT = "import"
_LONGEST_POLL_S = 3600.0
"""poll counts milliseconds in 32 bits."""


@dataclass
class Seen:
    """What was seen of one worker."""

    phase: str = "import"
    """The last phase it entered; until it says so, its interpreter is still importing."""
    record: Record | None = None
    exited: Exited | None = None
    malformed: str | None = None
    """The first line that was no event, and why."""
    limit_s: float | None = None
    """The limit that ran out, if one did."""


class _Clock:
    """The time a worker has left: one allowance for imports, and the case's timeout for everything else together."""

    def __init__(self, timeout_s: float, import_limit_s: float) -> None:
        self._timeout_s = timeout_s
        self._import_limit_s = import_limit_s
        self._left_s = timeout_s
        self._entered = time.monotonic()
        self._importing = True  # until the worker says otherwise, its interpreter is starting

    def enter(self, phase: str) -> None:
        """The worker enters a phase."""
        now = time.monotonic()
        if not self._importing:
            self._left_s -= now - self._entered
        if not (self._importing and phase == _IMPORT):  # starting and importing share one allowance
            self._entered = now
        self._importing = phase == _IMPORT

    @property
    def limit_s(self) -> float:
        """The limit that counts now."""
        return self._import_limit_s if self._importing else self._timeout_s

    def left_s(self) -> float:
        """Seconds until that limit."""
        return (self._import_limit_s if self._importing else self._left_s) - (time.monotonic() - self._entered)


class _Lines:
    """Events from a descriptor, line by line."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._rest = b""
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)

    def read(self, wait_s: float) -> list[bytes] | None:
        """Complete lines that came within the wait, perhaps none; None at the end of the events."""
        if not self._poll.poll(min(max(0.0, wait_s), _LONGEST_POLL_S) * 1000):
            return []
        chunk = os.read(self._fd, 1 << 16)
        if not chunk:
            return None
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        return [line for line in lines if line]


def _events(lines: list[bytes], seen: Seen) -> Iterator[Event]:
    for line in lines:
        try:
            yield decode_event(line)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            seen.malformed = seen.malformed or f"{line[:200]!r}: {error}"


def _note(event: Event, seen: Seen) -> None:
    if isinstance(event, Phase):
        seen.phase = event.name
    elif isinstance(event, Finished):
        seen.record = event.record
    else:
        seen.exited = event


def follow(channel: Channel, *, timeout_s: float, import_limit_s: float, tell: Callable[[Event], None]) -> Seen:
    """Read events until the worker and everything it started is gone; past its limit it is ended.

    Args:
        channel: handed over to a supervisor.
        timeout_s: wall-clock seconds for all phases but "import".
        import_limit_s: seconds until the first phase, and for each phase "import".
        tell: hears every event. What it raises leaves here, like Ctrl-C, after the worker has been ended.
    """
    seen = Seen()
    try:
        _follow(channel, _Clock(timeout_s, import_limit_s), seen, tell)
    finally:
        if seen.exited is None:
            _wait_until_gone(channel)
    return seen


def _follow(channel: Channel, clock: _Clock, seen: Seen, tell: Callable[[Event], None]) -> None:
    lines = _Lines(channel.events_read_fd)
    give_up = float("inf")
    while seen.exited is None and time.monotonic() < give_up:
        if seen.limit_s is None and clock.left_s() <= 0:
            seen.limit_s = clock.limit_s
            channel.end(TIMED_OUT)
            give_up = time.monotonic() + _GONE_S
        batch = lines.read(clock.left_s() if seen.limit_s is None else give_up - time.monotonic())
        if batch is None:
            return
        for event in _events(batch, seen):
            _note(event, seen)
            if isinstance(event, Phase):
                clock.enter(event.name)
            tell(event)


def _wait_until_gone(channel: Channel) -> None:
    """End the worker, and wait for the end of the events: then not even the supervisor is left. At most 40 s."""
    channel.end()
    lines = _Lines(channel.events_read_fd)
    deadline = time.monotonic() + _GONE_S
    while (left_s := deadline - time.monotonic()) > 0:
        if lines.read(left_s) is None:
            return
