"""Which cases of a machine no other beats in both speed and memory, and what one changed field does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from hpc_core.case.case import Case, case_to_json
from hpc_core.record.plain import plain
from hpc_core.report.entry import BUSY, WALL, Entry

_MOST_CHANGES = 3
_MOST_CASES = 60
"""Of one group, because each is compared with each."""
_PARTS = ("model", "quantization", "adapter", "workload")
_Fields = dict[str, dict[str, Any] | None]


def speed_of(entry: Entry) -> float | None:
    """Return unpadded tokens per second."""
    found = entry.value("tokens_per_s")
    return found if found is not None and found > 0 else None


def front(points: Sequence[tuple[float, float]]) -> tuple[int, ...]:
    """Return the indices of the points (memory, speed) that no other beats: none has less memory and is as fast, or is faster for no more.

    In order of memory. Of equal points the first stands for all.
    """
    chosen: list[int] = []
    best = float("-inf")
    for index in sorted(range(len(points)), key=lambda each: (points[each][0], -points[each][1], each)):
        if points[index][1] > best:
            best = points[index][1]
            chosen.append(index)
    return tuple(chosen)


def comparable(entries: Iterable[Entry]) -> dict[tuple[str, str, str], list[Entry]]:
    """Return cases with a peak by machine, model and kind: within these groups a comparison is fair."""
    groups: dict[tuple[str, str, str], list[Entry]] = {}
    for entry in entries:
        if not entry.value("peak_bytes"):
            continue
        shape = entry.case.partition("/")[0]
        groups.setdefault((entry.machine, shape, entry.record.case.kind), []).append(entry)
    return groups


class Effect(msgspec.Struct, frozen=True, kw_only=True):
    """A case as ratios to the base."""

    entry: Entry
    changes: tuple[str, ...]
    """What differs: "checkpointing non-reentrant", "no adapter"."""
    memory: float
    """Peak over the base's."""
    time: float | None
    """GPU-busy time over the base's, or wall time without a GPU. None if either is missing."""


class Ablation(msgspec.Struct, frozen=True, kw_only=True):
    """A base, and the cases that differ from it in one to three fields."""

    base: Entry
    time_metric: str | None
    effects: tuple[Effect, ...]


def ablations_of(entries: Iterable[Entry]) -> tuple[Ablation, ...]:
    """Return one for each group of comparable cases that has neighbours; the base is the case with the most neighbours."""
    found = []
    for group in comparable(entries).values():
        chosen = group[:_MOST_CASES]
        fields = {id(entry): _fields(entry.record.case) for entry in chosen}
        near = {id(base): _neighbours(base, chosen, fields) for base in chosen}
        base = max(chosen, key=lambda each: _centrality(near[id(each)], each))
        if near[id(base)]:
            found.append(_ablation(base, near[id(base)]))
    return tuple(found)


def _centrality(near: Sequence[tuple[Entry, tuple[str, ...]]], entry: Entry) -> tuple[int, int, bool, int]:
    """Return a key: most neighbours, then the nearest ones; of equals the unquantized one, then the shortest name."""
    unquantized = entry.record.case.quantization is None
    return len(near), -sum(len(changes) for _, changes in near), unquantized, -len(entry.case)


def _neighbours(base: Entry, group: Sequence[Entry], fields: dict[int, _Fields]) -> list[tuple[Entry, tuple[str, ...]]]:
    found = []
    for other in group:
        changes = _changes(fields[id(base)], fields[id(other)])
        if 0 < len(changes) <= _MOST_CHANGES:
            found.append((other, tuple(_change_text(other.record.case, part, name) for part, name in changes)))
    return found


def _fields(case: Case) -> _Fields:
    """Return the stated fields by part; an absent part is None."""
    parts = msgspec.json.decode(case_to_json(case))
    return {name: parts.get(name) for name in _PARTS}


def _changes(old: _Fields, new: _Fields) -> list[tuple[str, str]]:
    """Return the parts and fields that differ. A part that comes or goes is one change, without a field."""
    if old == new:
        return []
    found = []
    for part in _PARTS:
        before, after = old[part], new[part]
        if before is None or after is None:
            found += [(part, "")] if before != after else []
        elif before != after:
            found += [(part, name) for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
    return found


def _change_text(case: Case, part: str, name: str) -> str:
    """Return the changed part or field as it is in this case, defaults included."""
    whole = getattr(case, part)
    if whole is None:
        return f"no {part}"
    if not name:
        return f"{part} {getattr(whole, 'kind', '')}".strip()
    value = getattr(whole, name, None)
    return plain(f"{name} {value if isinstance(value, str | int | float) else msgspec.to_builtins(value)}", 60)


def _ablation(base: Entry, near: Sequence[tuple[Entry, tuple[str, ...]]]) -> Ablation:
    metric = base.name_of(*BUSY, *WALL)
    memory, time = base.value("peak_bytes") or 1.0, None if metric is None else base.value(metric)
    effects = []
    for entry, changes in sorted(near, key=lambda each: (len(each[1]), each[0].case)):
        other = None if metric is None else entry.value(metric)
        ratio = other / time if other and time else None
        peak = entry.value("peak_bytes") or 0.0
        effects.append(Effect(entry=entry, changes=changes, memory=peak / memory, time=ratio))
    return Ablation(base=base, time_metric=metric, effects=tuple(effects))
