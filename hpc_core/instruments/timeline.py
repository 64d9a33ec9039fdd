"""From a stream of allocations to the memory by category at the peak. Pure: no torch, no clock.

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
    """One piece of memory from its birth to its death, on a clock that counts events."""

    size_bytes: int
    born: int
    phase: int
    """Index of the phase in which it was born; -1 before the step."""
    died: int | None = None
    died_in: int | None = None
    """Index of the phase in which it died; None when it outlived the step."""
    category: str | None = None
    """Set when the owner is known (weights, adapter, gradients, optimizer, kv_cache, other)."""
    source: str = ""
    """The operator that made it, where known."""
    module: str = ""
    """The path of the module that it was made for, or that owns it, where known."""
    block: int | None = None
    """Its address in a model of the allocator, where there is one."""


@dataclass
class Timeline:
    """All allocations of a step, and the events at which they came and went."""

    allocations: list[Allocation] = field(default_factory=list)

    def peak(self) -> tuple[int, int]:
        """The event and the live bytes at the highest point; (0, 0) for an empty timeline."""
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
        """The highest live bytes within each phase, counted from its first event."""
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
                peaks[names[opened]] = max(peaks[names[opened]], live)  # what the phase inherits counts
                current = opened
            live += change
            if current >= 0:
                peaks[names[current]] = max(peaks[names[current]], live)
        for unseen in names[current + 1 :]:
            peaks[unseen] = live  # nothing came or went in it, and what it inherited stayed
        return peaks

    def at_peak(self) -> Mapping[str, int]:
        """Live bytes by category at the highest point; they add up to the peak."""
        totals = dict.fromkeys(CATEGORIES, 0)
        for category, piece in self._alive_at_peak():
            totals[category] += piece.size_bytes
        return totals

    def makers_at_peak(self, most: int = 24) -> dict[str, int]:
        """Live bytes at the highest point by "category operator", the largest first, `most` of them: who made what is there."""
        totals: dict[str, int] = {}
        for category, piece in self._alive_at_peak():
            name = f"{category} {piece.source}".rstrip()
            totals[name] = totals.get(name, 0) + piece.size_bytes
        largest = sorted(totals.items(), key=lambda each: (-each[1], each[0]))
        return dict(largest[:most])

    def pieces_at_peak(self, phases: Sequence[str]) -> tuple[Piece, ...]:
        """What is alive at the highest point by category, module, phase and operator, the largest first."""
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
        """The live bytes by category at `most` events or fewer: of each stretch of events the highest and the lowest.

        So the peak is kept as it is, nothing is above what was there, and every sample is a moment that was. The first event of each
        phase is kept too.

        Raises:
            ValueError: fewer points than it takes to keep the phases and the peak.
        """
        if most < len(phases) + 4:
            raise ValueError(f"{most} points are too few for {len(phases)} phases and the peak.")
        moments = self._moments()
        kept = [moments[index] for index in _telling([(at.phase, at.total) for at in moments], most)]
        seen = [category for category in CATEGORIES if any(at.live[category] for at in kept)]
        return MemoryTimeline(
            phases=tuple(phases),
            events=tuple(at.event for at in kept),
            phase=tuple(at.phase for at in kept),
            bytes_by_category={category: tuple(at.live[category] for at in kept) for category in seen},
        )

    def _moments(self) -> list[_Moment]:
        """Every event in order, with what lives after it."""
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


def _telling(points: Sequence[tuple[int, int]], most: int) -> list[int]:
    """Which of these (phase, bytes) to keep: the first of each phase, the last of all, the highest and lowest of each stretch."""
    if len(points) <= most:
        return list(range(len(points)))
    firsts = [index for index, point in enumerate(points) if index == 0 or point[0] != points[index - 1][0]]
    kept = {*firsts, len(points) - 1}
    stretches = (most - len(kept)) // 2
    for number in range(stretches):
        begin, end = number * len(points) // stretches, (number + 1) * len(points) // stretches
        kept.add(max(range(begin, end), key=lambda index: points[index][1]))
        kept.add(min(range(begin, end), key=lambda index: points[index][1]))
    return sorted(kept)


def _guess(piece: Allocation, peak_phase: int) -> str:
    """Nobody owns it: it is an activation if it outlives the phase that made it, a temporary otherwise."""
    if piece.phase < 0:
        return "other"
    outlives = piece.died_in is None or piece.died_in > piece.phase
    return "activations" if piece.phase < peak_phase or outlives else "temporaries"
