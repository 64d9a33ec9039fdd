"""What instruments know of a workload: a step, its phases, and the period of its shapes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol

import torch

Mark = Callable[[str], None]
"""Called on the host with a phase's name when the phase begins, without synchronizing."""


def unmarked(phase: str) -> None:
    """Ignore the phase: the mark of a step that is not observed."""


class Program(Protocol):
    """Something that can be run step by step."""

    phases: tuple[str, ...]
    """The phases of one step in order; the first begins with the step."""
    period: int
    """Steps after which the shapes of the data repeat: 1 if all steps have the same shapes."""

    def step(self, mark: Mark = unmarked) -> None:
        """Queue one unit of work on the device; the caller synchronizes."""


class _Cyclic(Program, Protocol):
    """A program that iterates over its data, and can jump to any index of it."""

    steps_done: int


class Fixed:
    """A program that repeats one step of another program, so that every pass has the same shapes."""

    period = 1

    def __init__(self, program: _Cyclic, index: int):
        self._program, self._index = program, index
        self.phases = program.phases

    def step(self, mark: Mark = unmarked) -> None:
        """Run the step at this index of the program's data."""
        self._program.steps_done = self._index
        self._program.step(mark)


def copied(part: torch.Tensor) -> torch.Tensor:
    """Return a copy on the device, so that restoring it is asynchronous; on the host if less than twice its size is free."""
    if part.is_cuda and torch.cuda.mem_get_info(part.device)[0] < 2 * part.nbytes:
        return part.detach().cpu()
    return part.detach().clone()


@contextlib.contextmanager
def weights_restored(model: torch.nn.Module) -> Iterator[None]:
    """Restore every trained weight after the block, at the same address."""
    trained = [part for part in model.parameters() if part.requires_grad]
    before = [copied(part) for part in trained]
    try:
        yield
    finally:
        with torch.no_grad():
            for part, value in zip(trained, before, strict=True):
                part.copy_(value)
