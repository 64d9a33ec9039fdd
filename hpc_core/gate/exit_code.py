"""The exit codes of the plugin and of every command, in one place."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """How a run or a command ended. In pytest runs, 2 to 5 keep pytest's own meaning."""

    OK = 0
    FAILED = 1
    """Something is worse, invalid, or must be repaired."""
    REFUSED = 2
    """The command was used wrongly, or its input cannot be read; stderr says why in one line."""
    NOT_COMPARABLE = 10
    """There is nothing to compare with, or noise leaves the answer open."""
    BROKEN = 11
    """A run crashed, timed out or ran out of memory."""
    CANNOT_TEST = 125
    """What `git bisect run` reads as: this commit cannot be tested, skip it."""
    INTERRUPTED = 130
    """Ctrl-C."""
