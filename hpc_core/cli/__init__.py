"""The command line `hpc-core`. It starts without torch: what needs torch runs in workers.

This module holds the entry point and the handling of errors. Each group of commands has its own module.
"""

from __future__ import annotations

import io
import os
import sys
from typing import TYPE_CHECKING

from hpc_core.case.errors import HpcCoreError
from hpc_core.gate.exit_code import ExitCode
from hpc_core.record.plain import plain

if TYPE_CHECKING:
    import typer


def main(arguments: list[str] | None = None) -> None:
    """Run one command of `hpc-core`."""
    from hpc_core.cli.commands import app

    run_app(app, "hpc-core", arguments)


def run_app(app: typer.Typer, name: str, arguments: list[str] | None = None) -> None:
    """Run a command. A user's mistake becomes one line on stderr and exit code 2, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that is no UTF-8, or a terminal that knows only ASCII
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            app(args=arguments, prog_name=name)
        finally:
            _flush()
    except (HpcCoreError, OSError) as error:
        _drop_output()
        print(f"{name}: {plain(' '.join(_message(error).split()))}", file=sys.stderr)  # noqa: T201
        sys.exit(ExitCode.REFUSED)
    except KeyboardInterrupt:
        print(f"{name}: interrupted. All workers have ended.", file=sys.stderr)  # noqa: T201
        sys.exit(ExitCode.INTERRUPTED)


def _flush() -> None:
    """Write what is still buffered: a full disk is an error of this command, not of the interpreter's end.

    Raises:
        OSError: it cannot be written.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()  # the reader, such as head, has what it wants; the exit code stays


def _drop_output() -> None:
    """Send what cannot be written nowhere, or the interpreter's end would report it again."""
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _message(error: HpcCoreError | OSError) -> str:
    """Return our own message, or the file and the reason of an operating system error."""
    if isinstance(error, OSError) and error.strerror:
        # A file is written under a temporary name and then renamed: the second name is the one that the user gave.
        name = error.filename2 or error.filename
        return f"{error.strerror}." if name is None else f"{name}: {error.strerror}."
    return str(error)
