"""Turn a stream of allocations into the memory by category at the peak. Imports no torch and reads no clock.

Categories are those of a training or generation step: weights, adapter, gradients, optimizer state, KV cache,
activations, temporaries, other (inputs, workspaces) and rounding (what the allocator hands out beyond the request).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from hpc_core.record.profile import Piece
from hpc_core.record.record import MemoryTimeline

CATEGORIES = ("weights", "adapter", "gradients", "optimizer", "kv_cache", "activations", "temporaries", "other")


@dataclass
class Allocation:
    """One piece of memory, from its allocation to its release. Time counts events."""

    size_bytes: int
    born: int
    phase: int
    """Index of the phase that allocated it; -1 before the step."""
    died: int | None = None
    died_in: int | None = None
    """Index of the phase that released it; None if it outlived the step."""
    category: str | None = None
    """Set if the owner is known (weights, adapter, gradients, optimizer, kv_cache, other)."""
    source: str = ""
    """The operator that made it, if known."""
    module: str = ""
    """The path of the module that made or owns it, if known."""
    block: int | None = None
    """Its address in a model of the allocator, if there is one."""


@dataclass
class Timeline:
    """All allocations of a step."""

    allocations: list[Allocation] = field(default_factory=list)

    def peak(self) -> tuple[int, int]:
        """Return the event and the live bytes at the peak; (0, 0) for an empty timeline."""
        changes: dict[int, int] = {}
        for piece in self.allocations:
            changes[piece.born] = changes.get(piece.born, 0) + piece.size_bytes
            if piece.died is not None:
                changes[piece.died] = changes.get(piece.died, 0) - piece.size_bytes
        live, best, when = 0, 0, 0
        for event in sorted(changes):
            live += changes[event]
            if live > best:
                best, when = live, event
        return when, best

    def peaks_by_phase(self, phases: Iterable[str]) -> dict[str, int]:
        """Return the highest live bytes within each phase, counted from its first event."""
        order = sorted(
            [(piece.born, piece.size_bytes, piece.phase) for piece in self.allocations]
            + [(piece.died, -piece.size_bytes, piece.died_in) for piece in self.allocations if piece.died is not None],
            key=lambda event: event[0] or 0,
        )
        names = list(phases)
        live, peaks = 0, dict.fromkeys(names, 0)
        current = -1
        for _, change, phase in order:
            for opened in range(current + 1, (phase if phase is not None else current) + 1):
                peaks[names[opened]] = max(peaks[names[opened]], live)  # memory from earlier phases counts
                current = opened
            live += change
            if current >= 0:
                peaks[names[current]] = max(peaks[names[current]], live)
        for silent in names[current + 1 :]:
            peaks[silent] = live  # it has no events of its own
        return peaks

    def at_peak(self) -> Mapping[str, int]:
        """Return the live bytes by category at the peak; they add up to it."""
        totals = dict.fromkeys(CATEGORIES, 0)
        for category, piece in self._alive_at_peak():
            totals[category] += piece.size_bytes
        return totals

    def makers_at_peak(self, most: int = 24) -> dict[str, int]:
        """Return the live bytes at the peak by "category operator", the `most` largest ones, largest first."""
        totals: dict[str, int] = {}
        for category, piece in self._alive_at_peak():
            name = f"{category} {piece.source}".rstrip()
            totals[name] = totals.get(name, 0) + piece.size_bytes
        largest = sorted(totals.items(), key=lambda each: (-each[1], each[0]))
        return dict(largest[:most])

    def pieces_at_peak(self, phases: Sequence[str]) -> tuple[Piece, ...]:
        """Return what is alive at the peak by category, module, phase and operator, the largest first."""
        found: dict[tuple[str, str, str, str], tuple[int, int]] = {}
        for category, piece in self._alive_at_peak():
            phase = phases[piece.phase] if piece.phase >= 0 else ""
            key = (category, piece.module, phase, piece.source)
            size, count = found.get(key, (0, 0))
            found[key] = (size + piece.size_bytes, count + 1)
        largest = sorted(found.items(), key=lambda each: (-each[1][0], each[0]))
        return tuple(Piece(*key, size, count) for key, (size, count) in largest if size)

    def _alive_at_peak(self) -> list[tuple[str, Allocation]]:
        when, _ = self.peak()
        peak_phase = max((piece.phase for piece in self.allocations if piece.born <= when), default=-1)
        return [
            (piece.category or _guess(piece, peak_phase), piece)
            for piece in self.allocations
            if piece.born <= when and (piece.died is None or piece.died > when)
        ]

    def sampled(self, phases: Sequence[str], most: int = 400) -> MemoryTimeline:
        """Return the live bytes by category at no more than `most` events.

        Keeps the first event of each phase, and the highest and lowest of each stretch of events. So every sample is a real
        moment, and the peak is among them.

        Raises:
            ValueError: `most` is too small to keep the phases and the peak.
        """
        if most < len(phases) + 4:
            raise ValueError(f"{most} points are too few for {len(phases)} phases and the peak.")
        moments = self._moments()
        chosen = [moments[index] for index in _extremes([(at.phase, at.total) for at in moments], most)]
        present = [category for category in CATEGORIES if any(at.live[category] for at in chosen)]
        return MemoryTimeline(
            phases=tuple(phases),
            events=tuple(at.event for at in chosen),
            phase=tuple(at.phase for at in chosen),
            bytes_by_category={category: tuple(at.live[category] for at in chosen) for category in present},
        )

    def _moments(self) -> list[_Moment]:
        """Return every event in order, with the live bytes after it."""
        changes: dict[int, list[tuple[int, str, int]]] = {}
        for piece in self.allocations:
            category = piece.category or _guess(piece, piece.phase)
            changes.setdefault(piece.born, []).append((piece.phase, category, piece.size_bytes))
            if piece.died is not None:
                at = piece.phase if piece.died_in is None else piece.died_in
                changes.setdefault(piece.died, []).append((at, category, -piece.size_bytes))
        live, phase, moments = dict.fromkeys(CATEGORIES, 0), -1, []
        for event in sorted(changes):
            for at, category, size_bytes in changes[event]:
                phase = max(phase, at)
                live[category] += size_bytes
            moments.append(_Moment(event, phase, dict(live)))
        return moments


@dataclass(frozen=True)
class _Moment:
    event: int
    phase: int
    live: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.live.values())


def _extremes(points: Sequence[tuple[int, int]], most: int) -> list[int]:
    """Choose among (phase, bytes): the first of each phase, the last of all, the highest and lowest of each stretch."""
    if len(points) <= most:
        return list(range(len(points)))
    firsts = [index for index, point in enumerate(points) if index == 0 or point[0] != points[index - 1][0]]
    chosen = {*firsts, len(points) - 1}
    stretches = (most - len(chosen)) // 2
    for number in range(stretches):
        begin, end = number * len(points) // stretches, (number + 1) * len(points) // stretches
        chosen.add(max(range(begin, end), key=lambda index: points[index][1]))
        chosen.add(min(range(begin, end), key=lambda index: points[index][1]))
    return sorted(chosen)


def _guess(piece: Allocation, peak_phase: int) -> str:
    """Return the category of memory without an owner: an activation outlives the phase that made it, a temporary does not."""
    if piece.phase < 0:
        return "other"
    outlives = piece.died_in is None or piece.died_in > piece.phase
    return "activations" if piece.phase < peak_phase or outlives else "temporaries"
