"""What measuring may know of a workload: a step, its phases, and when shapes repeat."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

__all__ = ["Mark", "Program", "unmarked"]

Mark = Callable[[str], None]
"""Called with a phase's name at the moment it begins, on the host, without synchronizing."""


def unmarked(phase: str) -> None:
    """The mark of a step that nobody watches."""


class Program(Protocol):
    """Something that can be run step by step."""

    phases: tuple[str, ...]
    """The phases of one step in order; the first begins with the step."""
    period: int
    """Steps after which the shapes of the data repeat: 1 when every step has the same."""

    def step(self, mark: Mark = unmarked) -> None:
        """One unit of work, queued on the device; the caller synchronizes."""
