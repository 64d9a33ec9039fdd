"""Show where a run is: one live line below pytest's own on a terminal, one plain line per case elsewhere.

Writes to its own file descriptor, so that pytest's capture neither sees it nor is disturbed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Iterator
from typing import TextIO

_TICK_S = 0.5
# Scroll if this is the last line, save the cursor, write the line below, and return.
_BELOW = "\x1bD\x1b[A\x1b7\x1b[B\r{text}\x1b[K\x1b8"


def duration(seconds: float) -> str:
    """Format seconds: "8 s", "2 min 05 s", "1 h 02 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Progress:
    """Count cases, and show where the run is.

    Args:
        ticking: update the seconds from a thread. False if cases run in this process.
    """

    def __init__(self, *, ticking: bool = True) -> None:
        self.total = 0
        self._stream: TextIO | None = None
        self._ticking = ticking
        self._done = 0
        self._began = time.monotonic()
        self._case = ""
        self._case_began = self._began
        self._phase = ""

    def show_on(self, fd: int) -> None:
        """Show a live line on the terminal of this file descriptor, which may be redirected later."""
        self._stream = os.fdopen(os.dup(fd), "w", encoding="utf-8", errors="replace")

    @property
    def count(self) -> str:
        """The number of the current or last case, and of all: "3/14"."""
        return f"{self._done}/{max(self.total, self._done)}"

    @property
    def case_s(self) -> float:
        """Seconds since the case began."""
        return time.monotonic() - self._case_began

    @contextlib.contextmanager
    def case(self, case_id: str) -> Iterator[None]:
        """Show a line while a case runs, and remove it afterwards."""
        if self._done == 0:
            self._began = time.monotonic()
        self._done += 1
        self._case, self._case_began, self._phase = case_id, time.monotonic(), "start"
        if self._stream is None:
            yield
            return
        over = threading.Event()
        thread = threading.Thread(target=self._tick, args=(over,), daemon=True)
        if self._ticking:
            thread.start()
        self._draw()
        try:
            yield
        finally:
            over.set()
            if self._ticking:
                thread.join()
            self._write("")

    def phase(self, name: str) -> None:
        """Show that the case enters a phase."""
        self._phase = name
        if self._stream is not None:
            self._draw()

    def close(self) -> None:
        """Release the terminal. May be called again."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _tick(self, over: threading.Event) -> None:
        while not over.wait(_TICK_S):
            self._draw()

    def _draw(self) -> None:
        parts = [f"case {self._done} of {max(self.total, self._done)}", self._case, self._phase, duration(self.case_s)]
        finished = self._done - 1
        if finished:
            a_case = (self._case_began - self._began) / finished
            left = a_case * (self.total - finished) - self.case_s
            parts.append(f"about {duration(max(left, 1))} left")
        self._write(" · ".join(parts)[: shutil.get_terminal_size().columns - 1])

    def _write(self, text: str) -> None:
        # A closed terminal must not fail a test.
        with contextlib.suppress(OSError, ValueError):
            if self._stream is not None:
                self._stream.write(_BELOW.format(text=text))
                self._stream.flush()
