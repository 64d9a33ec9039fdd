"""The command line `hpc-core`. Starts without torch; what measures runs in workers.

Here are the program's entry and what ends it; each group of commands has a module of its own.
"""

from __future__ import annotations

import sys

from hpc_core.case.errors import HpcCoreError
from hpc_core.gate.exit_code import ExitCode

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> None:
    """Run one command. What the user got wrong is one line on stderr and exit code 2, never a traceback."""
    from hpc_core.cli.commands import app

    try:
        app(args=arguments, prog_name="hpc-core")
    except (HpcCoreError, OSError) as error:
        print(f"hpc-core: {' '.join(_said(error).split())}", file=sys.stderr)  # noqa: T201
        sys.exit(ExitCode.REFUSED)
    except KeyboardInterrupt:
        print("hpc-core: interrupted; no worker is left.", file=sys.stderr)  # noqa: T201
        sys.exit(ExitCode.INTERRUPTED)


def _said(error: HpcCoreError | OSError) -> str:
    """Our own words; of the system's, the file that was meant and what is wrong with it."""
    if isinstance(error, OSError) and error.strerror:
        # A file is written beside its place and then renamed: the second name is the one that was asked for.
        name = error.filename2 or error.filename
        return f"{error.strerror}." if name is None else f"{name}: {error.strerror}."
    return str(error)
