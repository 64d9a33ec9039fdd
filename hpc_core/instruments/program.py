"""What instruments may know of a workload: a step, its phases, and when shapes repeat."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol

import torch

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


class _Cyclic(Program, Protocol):
    """A program that goes through its data, and can be sent to a place in it."""

    steps_done: int


class Fixed:
    """A program that does the same step of another one again and again, so that every pass sees the same shapes."""

    period = 1

    def __init__(self, program: _Cyclic, index: int):
        self._program, self._index = program, index
        self.phases = program.phases

    def step(self, mark: Mark = unmarked) -> None:
        """Run the step at this index of the program's data."""
        self._program.steps_done = self._index
        self._program.step(mark)


def copied(part: torch.Tensor) -> torch.Tensor:
    """A copy on the device where twice its size is free there, so that putting it back waits for nothing; else on the host."""
    if part.is_cuda and torch.cuda.mem_get_info(part.device)[0] < 2 * part.nbytes:
        return part.detach().cpu()
    return part.detach().clone()


@contextlib.contextmanager
def weights_restored(model: torch.nn.Module) -> Iterator[None]:
    """After the block every trained weight holds what it held before, at the same address."""
    trained = [part for part in model.parameters() if part.requires_grad]
    before = [copied(part) for part in trained]
    try:
        yield
    finally:
        with torch.no_grad():
            for part, value in zip(trained, before, strict=True):
                part.copy_(value)
