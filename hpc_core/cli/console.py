"""Print results to stdout and progress to stderr."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from typing import Literal

from hpc_core.record.plain import plain, plain_json
from hpc_core.report.entry import Row
from hpc_core.report.terminal import render


def say(text: str = "") -> None:
    """Print a line of the result. It may name files, and a file may have any name."""
    sys.stdout.write(f"{plain(text)}\n")


def say_json(thing: object, *, order: Literal["sorted"] | None = "sorted") -> None:
    """Print a result as indented JSON, with sorted keys unless `order` is None."""
    say_encoded(plain_json(thing, indent=2, sort=order == "sorted"))


def say_encoded(content: bytes) -> None:
    """Print a result that is JSON already, as it is: JSON escapes what controls a terminal."""
    sys.stdout.write(f"{content.decode()}\n")


def tell(text: str) -> None:
    """Print a line of progress, which is not part of the result."""
    sys.stderr.write(f"{plain(text)}\n")
    sys.stderr.flush()


def show(rows: Sequence[Row]) -> None:
    """Print the table of these rows, in colour on a terminal."""
    sys.stdout.write(f"{render(rows, width=shutil.get_terminal_size().columns, color=sys.stdout.isatty())}\n")
