"""Every tensor storage that a step makes, watched below autograd: the CPU's stand-in for an allocator's history.

Counts the bytes of tensors, not what a CPU kernel takes for itself, so the numbers depend on the stack and not on the
machine. Works on any device; on CUDA the allocator's own history is exact and is used instead.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hpc_core.instruments.counters import FREE
from hpc_core.instruments.places import nowhere
from hpc_core.instruments.timeline import Allocation, Timeline

__all__ = ["StorageWatch"]


class StorageWatch(TorchDispatchMode):
    """While active, records birth and death of every storage; it is also the mark of the step's phases."""

    def __init__(self, phases: Sequence[str]):
        super().__init__()
        self._phases = list(phases)
        self._phase = -1
        self._clock = 0
        self._known: dict[int, tuple[weakref.ref[Any], Allocation]] = {}
        self.timeline = Timeline()
        self.place = nowhere
        """Says for which module an operator runs."""
        self.uses: Counter[tuple[str, str, str]] = Counter()
        """Operators by module, phase and name, as `measure.counters` counts them."""

    def __call__(self, phase: str) -> None:
        """A phase begins."""
        self._phase = self._phases.index(phase)

    def own(self, category: str, tensors: Iterable[torch.Tensor]) -> None:
        """Say who owns these tensors, whether they were there before or were made in the step."""
        for tensor in tensors:
            self._add(tensor, "")
            self._known[id(tensor.untyped_storage())][1].category = category

    def name(self, module: str, tensors: Iterable[torch.Tensor]) -> None:
        """Say which module these tensors belong to, as far as they are known here."""
        for tensor in tensors:
            known = self._known.get(id(tensor.untyped_storage()))
            if known is not None and known[0]() is tensor.untyped_storage():
                known[1].module = module

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, and note the storages that it returns; one that it takes and nobody made was there before."""
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, torch.Tensor):
                self._add(value, "", before=True)
        out = func(*args, **(kwargs or {}))
        module, source = self.place(), str(func)
        if func.namespace not in FREE:
            self.uses[module, self._phases[self._phase] if self._phase >= 0 else "", source] += 1
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                self._add(value, source, module=module)
        return out

    def _add(self, tensor: torch.Tensor, source: str, *, before: bool = False, module: str = "") -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        known = self._known.get(key)
        if known is not None and known[0]() is storage:
            return
        self._clock += 1
        born, phase = (0, -1) if before else (self._clock, self._phase)
        source = source or f"held {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
        piece = Allocation(size_bytes=storage.nbytes(), born=born, phase=phase, source=source, module=module)
        self.timeline.allocations.append(piece)

        def died(_: Any) -> None:
            self._clock += 1
            piece.died, piece.died_in = self._clock, self._phase
            if self._known.get(key, (None, None))[1] is piece:
                del self._known[key]

        self._known[key] = (weakref.ref(storage, died), piece)
