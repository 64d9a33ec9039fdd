"""Find memory that every call of a step leaves behind, and the line that made it. Watches storages below autograd, as on a CPU."""

from __future__ import annotations

import gc
import itertools
import os
import sys
import sysconfig
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path, PurePath
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hpc_core.instruments.counters import without_compiling
from hpc_core.instruments.owners import living_tensors
from hpc_core.record import units as sizes

CALLS = 4
"""Enough to tell what each call leaves behind from what only the last one has not freed yet."""
_LEAST_BYTES = 1024
"""A call may keep a few scalars, such as its loss; `kept_objects` counts them."""
_OURS = f"{Path(__file__).parents[1]}{os.sep}"
_TORCH = f"{Path(torch.__file__).parent}{os.sep}"
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib", "platstdlib")})


class GrowthWatch(TorchDispatchMode):
    """Record every storage that calls make on a device, until it is freed, with the line of the user's that made it."""

    def __init__(self, device: torch.device):
        super().__init__()
        self._device = device
        self._call = 0
        self._held: list[int] = []
        self._known: dict[int, weakref.ref[Any]] = {}
        self._made: list[tuple[int, str, weakref.ref[Any]]] = []
        """The call, what was made and where, and the storage."""

    def run(self, call: Callable[[], None]) -> None:
        """Run a call. Compiled functions run eagerly in it."""
        if not self._call:
            gc.collect()
            self._known = {id(each): weakref.ref(each) for each in map(_storage_of, living_tensors(self._device))}
            self._held.append(self._alive())
        self._call += 1
        with without_compiling(), self:
            call()
        self._held.append(self._alive())

    def look(self) -> None:
        """Take what Python knows of now for the end of a call that somebody else made, without the lines that made it."""
        tensors = living_tensors(self._device)
        if self._held:
            self._call += 1
        for tensor in tensors:
            self._add(tensor, "")
        self._held.append(self._alive())

    @property
    def calls(self) -> int:
        """How many calls were seen."""
        return self._call

    def reason(self) -> str | None:
        """Return "memory grows 256 KiB a step, held float32[64, 1024] made in FILE:LINE" after at least `CALLS` calls; None if it does not.

        It grows if every call but the last left something behind and the total grew with it, or if the total grew by the same in
        each call, as a tensor does that is replaced by a longer one.
        """
        gc.collect()
        held = [*self._held[:-1], self._alive()]
        left = [sum(self._left(call).values()) for call in range(1, self._call)]
        steps = {later - earlier for earlier, later in itertools.pairwise(held)}
        grown = (held[-1] - held[0]) // self._call
        each = min(left)
        if grown < _LEAST_BYTES or not (each >= _LEAST_BYTES or len(steps) == 1):
            return None
        pieces = self._left(self._call - 1) or self._left(self._call)
        what, _ = pieces.most_common(1)[0]
        more = f" and {len(pieces) - 1} more" if len(pieces) > 1 else ""
        return (
            f"memory grows {sizes.quantity(each if each >= _LEAST_BYTES else grown, 'bytes')} a step, held {what}{more}"
        )

    def _left(self, call: int) -> Counter[str]:
        """Return the bytes that a call has made and that still exist, by what they are."""
        found: Counter[str] = Counter()
        for number, what, storage in self._made:
            alive = storage() if number == call else None
            if alive is not None:
                found[what] += alive.nbytes()
        return found

    def _alive(self) -> int:
        return sum(storage.nbytes() for known in self._known.values() if (storage := known()) is not None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and record the storages that it makes."""
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor) and value.device == self._device:
                self._add(value, str(func))
        return out

    def _add(self, tensor: torch.Tensor, operator: str) -> None:
        storage = tensor.untyped_storage()
        known = self._known.get(id(storage))
        if storage.device.type == "meta" or (known is not None and known() is storage):
            return
        self._known[id(storage)] = weakref.ref(storage)
        what = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
        if operator:
            what += f" made {_line() or f'by {operator}'}"
        self._made.append((self._call, what, self._known[id(storage)]))


def _storage_of(tensor: torch.Tensor) -> Any:
    return tensor.untyped_storage()


def _line() -> str:
    """Return "in FILE:LINE" of the user's own code that runs, else of the library's that calls torch; empty in a thread of torch's."""
    frame: FrameType | None = sys._getframe(1)
    library = ""
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((_OURS, _TORCH, "<")):
            place = f"in {PurePath(name).name}:{frame.f_lineno}"
            if not name.startswith(_LIBRARIES):
                return place
            library = library or place
        frame = frame.f_back
    return library
