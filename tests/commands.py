"""Runs a command line in the test's own process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def exit_code(main: Callable[[list[str]], object], *arguments: str | Path) -> int:
    """The exit code of a command with these arguments."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0
