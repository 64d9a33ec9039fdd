"""The CUDA caching allocator's own history of a step, as a timeline with owners.

Runs apart from the gated passes: recording does not change what is allocated, but it does cost host time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from hpc_core.case.errors import MeasureError
from hpc_core.instruments.timeline import Allocation, Timeline

__all__ = ["AllocatorHistory"]

_LIMIT = 4_000_000
"""Entries that the allocator keeps; a step of a 28-layer model makes about ten thousand."""


class AllocatorHistory:
    """Records between `start` and `stop`; it is also the mark of the step's phases."""

    def __init__(self, device: torch.device, phases: Sequence[str]):
        self._device = device
        self._phases = list(phases)
        self._marks: list[tuple[int, int]] = []
        self._owned: list[tuple[int, str, int]] = []
        self._before: list[Allocation] = []
        self._live: dict[int, Allocation] = {}
        self._start = 0

    def start(self) -> None:
        """Note what is there, and record from now on."""
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
        """Say who owns tensors that were there before `start`."""
        for tensor in tensors:
            piece = self._live.get(tensor.untyped_storage().data_ptr())
            if piece is not None:
                piece.category = category

    def own_now(self, category: str, tensors: Iterable[torch.Tensor]) -> None:
        """Say who owns tensors that live at this point of the step."""
        position = self._position()
        self._owned += [(position, category, tensor.untyped_storage().data_ptr()) for tensor in tensors]

    def __call__(self, phase: str) -> None:
        """A phase begins."""
        self._marks.append((self._position(), self._phases.index(phase)))

    def _position(self) -> int:
        """Allocations and frees since `start`, by the allocator's own counters: reading the history itself would copy it."""
        counters = torch.cuda.memory_stats_as_nested_dict(self._device)["allocation"]["all"]
        return int(counters["allocated"] + counters["freed"]) - self._start

    def _entries(self) -> list[dict[str, Any]]:
        traces = torch.cuda.memory._snapshot(self._device)["device_traces"]
        return [entry for entry in traces[self._device.index or 0] if entry["action"] in ("alloc", "free_requested")]

    def stop(self) -> Timeline:
        """Stop recording and put the timeline together.

        Raises:
            MeasureError: more happened than the allocator keeps.
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
