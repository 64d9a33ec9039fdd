"""Named ranges around each phase and each layer's forward, for the eye: in torch's profiler, and for NVIDIA's tools by NVTX."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.modules import module as hooks

__all__ = ["PREFIX", "Ranges", "named_ranges", "shown"]

PREFIX = "hpc-core:"
"""What the names of all ranges begin with, so that no table takes one for an operator."""


def shown(name: str) -> bool:
    """Whether a module has a range: a layer, what is right below it, and what is no layer's part (`lm_head`, `model.norm`)."""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return bool(name) and (not numbers or len(parts) <= numbers[0] + 2)


class Ranges:
    """Opens and closes ranges; it is also the mark of a step's phases."""

    def __init__(self, *, nvtx: bool, heard: Callable[[str], None] | None = None):
        self._nvtx = nvtx
        self._heard = heard
        self._names: dict[int, tuple[str, torch.nn.Module]] = {}
        self._open: list[tuple[int, Any]] = []
        self._phase: Any = None

    def __call__(self, phase: str) -> None:
        """A phase begins, and the one before it ends."""
        self.end_phase()
        if self._heard is not None:
            self._heard(phase)
        self._phase = self._begin(phase)

    def end_phase(self) -> None:
        """The phase that runs ends."""
        if self._phase is not None:
            self._end(self._phase)
        self._phase = None

    def entered(self, module: torch.nn.Module, _: Any) -> None:
        """A module's forward begins."""
        if id(module) not in self._names:
            for name, each in module.named_modules():
                self._names.setdefault(id(each), (name, each))
        name = self._names[id(module)][0]
        if shown(name):
            self._open.append((id(module), self._begin(name)))

    def left(self, module: torch.nn.Module, _: Any, __: Any) -> None:
        """It ends, or was broken off."""
        if any(key == id(module) for key, _ in self._open):
            while self._open:
                key, found = self._open.pop()
                self._end(found)
                if key == id(module):
                    return

    def _begin(self, name: str) -> Any:
        if self._nvtx:
            torch.cuda.nvtx.range_push(PREFIX + name)
            return True
        found = torch.profiler.record_function(PREFIX + name)
        found.__enter__()
        return found

    def _end(self, found: Any) -> None:
        if self._nvtx:
            torch.cuda.nvtx.range_pop()
        else:
            found.__exit__(None, None, None)


@contextlib.contextmanager
def named_ranges(*, nvtx: bool, heard: Callable[[str], None] | None = None) -> Iterator[Ranges]:
    """Ranges around every module's forward while the block runs; `heard` is told each phase at its beginning.

    An NVTX range is of one thread, and autograd runs the backward of what is on a GPU in threads of its own, so that no kernel of it
    would lie in its phase's range (nsys shows none there, ncu finds none). With `nvtx` the backward runs in the calling thread.
    """
    ranges = Ranges(nvtx=nvtx, heard=heard)
    handles = (
        hooks.register_module_forward_pre_hook(ranges.entered),
        hooks.register_module_forward_hook(ranges.left, always_call=True),
    )
    try:
        with torch.autograd.set_multithreading_enabled(False) if nvtx else contextlib.nullcontext():
            yield ranges
    finally:
        ranges.end_phase()
        for handle in handles:
            handle.remove()
