"""Record every allocation of a step as a timeline with owners.

On a GPU: the history of the CUDA caching allocator. Recording costs host time but does not change what is allocated, so it has a
pass of its own.

On a CPU: every tensor storage that a step makes, observed below autograd. It counts the bytes of tensors without the workspaces
of kernels, so the numbers depend on the stack and not on the machine.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hpc_core.case.errors import MeasureError
from hpc_core.instruments.counters import FREE, without_compiling
from hpc_core.instruments.places import nowhere
from hpc_core.instruments.timeline import Allocation, Timeline

_LIMIT = 4_000_000
"""Entries that the allocator keeps; a step of a 28-layer model makes about ten thousand."""


class AllocatorHistory:
    """Record the allocator between `start` and `stop`; the object is also the step's mark."""

    def __init__(self, device: torch.device, phases: Sequence[str]):
        self._device = device
        self._phases = list(phases)
        self._marks: list[tuple[int, int]] = []
        self._owned: list[tuple[int, str, int]] = []
        self._before: list[Allocation] = []
        self._live: dict[int, Allocation] = {}
        self._start = 0

    def start(self) -> None:
        """Note the allocations that exist, and record from now on."""
        # Without call stacks an entry costs under a microsecond.
        torch.cuda.memory._record_memory_history(enabled="all", context=None, stacks="python", max_entries=_LIMIT)
        self._start = self._position()
        for segment in torch.cuda.memory._snapshot(self._device)["segments"]:
            if segment["device"] != (self._device.index or 0):
                continue
            for block in segment["blocks"]:
                if block["state"] == "active_allocated":
                    piece = Allocation(size_bytes=block["requested_size"], born=0, phase=-1)
                    self._before.append(piece)
                    self._live[block["address"]] = piece

    def own_before(self, category: str, tensors: Iterable[torch.Tensor]) -> None:
        """Assign tensors that existed before `start` to a category."""
        for tensor in tensors:
            piece = self._live.get(tensor.untyped_storage().data_ptr())
            if piece is not None:
                piece.category = category

    def own_now(self, category: str, tensors: Iterable[torch.Tensor]) -> None:
        """Assign tensors that are alive at this point of the step to a category."""
        position = self._position()
        self._owned += [(position, category, tensor.untyped_storage().data_ptr()) for tensor in tensors]

    def __call__(self, phase: str) -> None:
        """Begin a phase."""
        self._marks.append((self._position(), self._phases.index(phase)))

    def _position(self) -> int:
        """Return the number of allocations and frees since `start`, from counters: reading the history would copy it."""
        counters = torch.cuda.memory_stats_as_nested_dict(self._device)["allocation"]["all"]
        return int(counters["allocated"] + counters["freed"]) - self._start

    def _entries(self) -> list[dict[str, Any]]:
        traces = torch.cuda.memory._snapshot(self._device)["device_traces"]
        return [entry for entry in traces[self._device.index or 0] if entry["action"] in ("alloc", "free_requested")]

    def stop(self) -> Timeline:
        """Stop recording and return the timeline.

        Raises:
            MeasureError: the step had more entries than the allocator keeps.
        """
        expected = self._position()
        entries = self._entries()
        torch.cuda.memory._record_memory_history(enabled=None)
        if len(entries) != expected:
            raise MeasureError(
                f"The allocator counted {expected:,} allocations and frees and kept {len(entries):,} of them (it keeps {_LIMIT:,} "
                "entries): the memory by category is void. Watch fewer tokens or steps."
            )
        return self._replay(entries)

    def _replay(self, entries: list[dict[str, Any]]) -> Timeline:
        timeline = Timeline(list(self._before))
        live = self._live
        owned = sorted(self._owned)
        marks = [*self._marks, (len(entries) + 1, -1)]
        phase, next_mark, next_owned = -1, 0, 0
        for position, entry in enumerate(entries, start=1):
            while next_owned < len(owned) and owned[next_owned][0] < position:
                _claim(live, owned[next_owned])
                next_owned += 1
            while marks[next_mark][0] < position:
                phase = marks[next_mark][1]
                next_mark += 1
            if entry["action"] == "alloc":
                piece = Allocation(size_bytes=entry["size"], born=position, phase=phase)
                timeline.allocations.append(piece)
                live[entry["addr"]] = piece
            elif entry["addr"] in live:
                piece = live.pop(entry["addr"])
                piece.died, piece.died_in = position, phase
        for claim in owned[next_owned:]:
            _claim(live, claim)
        return timeline


def _claim(live: dict[int, Allocation], claim: tuple[int, str, int]) -> None:
    _, category, address = claim
    if address in live:
        live[address].category = category


class StorageWatch(TorchDispatchMode):
    """Record the allocation and release of every storage while active; the object is also the step's mark."""

    def __init__(self, phases: Sequence[str]):
        super().__init__()
        self._phases = list(phases)
        self._phase = -1
        self._clock = 0
        self._known: dict[int, tuple[weakref.ref[Any], Allocation]] = {}
        self.timeline = Timeline()
        self.place = nowhere
        """Returns the path of the module that is running."""
        self.uses: Counter[tuple[str, str, str]] = Counter()
        """Operators by module, phase and name; the same ones that `counting` counts."""
        self._eager = contextlib.ExitStack()

    def __enter__(self) -> Any:
        """Record from now on. Compiled functions run eagerly."""
        self._eager.enter_context(without_compiling())
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        """Stop recording."""
        super().__exit__(*error)
        self._eager.close()

    def __call__(self, phase: str) -> None:
        """Begin a phase."""
        self._phase = self._phases.index(phase)

    def own(self, category: str, tensors: Iterable[torch.Tensor]) -> None:
        """Assign these tensors to a category, whether or not they existed before the step."""
        for tensor in tensors:
            self._add(tensor, "")
            if tensor.untyped_storage().device.type != "meta":
                self._known[id(tensor.untyped_storage())][1].category = category

    def claim(self, category: str, tensors: Iterable[torch.Tensor]) -> None:
        """Assign these tensors to a category, if they have been recorded."""
        for piece in self._recorded(tensors):
            piece.category = category

    def name(self, module: str, tensors: Iterable[torch.Tensor]) -> None:
        """Assign these tensors to a module, if they have been recorded."""
        for piece in self._recorded(tensors):
            piece.module = module

    def _recorded(self, tensors: Iterable[torch.Tensor]) -> Iterator[Allocation]:
        for tensor in tensors:
            known = self._known.get(id(tensor.untyped_storage()))
            if known is not None and known[0]() is tensor.untyped_storage():
                yield known[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and record the storages that it returns; unknown ones among its inputs existed before the step."""
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
        if storage.device.type == "meta":
            return  # it has a size and no memory
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
