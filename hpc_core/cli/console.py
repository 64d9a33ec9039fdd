"""Print results to stdout and progress to stderr."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from typing import Literal

from hpc_core.record.plain import plain_json
from hpc_core.report.entry import Row
from hpc_core.report.terminal import render


def say(text: str = "") -> None:
    """Print a line of the result."""
    sys.stdout.write(f"{text}\n")


def say_json(thing: object, *, order: Literal["sorted"] | None = "sorted") -> None:
    """Print a result as indented JSON, with sorted keys unless `order` is None."""
    say(plain_json(thing, indent=2, sort=order == "sorted").decode())


def tell(text: str) -> None:
    """Print a line of progress, which is not part of the result."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def show(rows: Sequence[Row]) -> None:
    """Print the table of these rows, in colour on a terminal."""
    say(render(rows, width=shutil.get_terminal_size().columns, color=sys.stdout.isatty()))
