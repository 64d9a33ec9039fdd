"""Find what holds more or less memory at the peak: by category, and by module and operator where both sides have a profile."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from hpc_core.explain.before import Before
from hpc_core.explain.findings import Finding, block, computes, label, leading, operator, parts
from hpc_core.record import units as sizes
from hpc_core.record.profile import Piece, Profile
from hpc_core.record.record import Metric, Record

_PREFIX, _SUFFIX = "at_peak_", "_bytes"
_ROUNDING = "rounding"
_HELD = "held "
_MOST_DETAILS = 12
_SHOWN_SHARE = 0.25
"""Share of everything that changed; a smaller change is not in the first lines."""


class _Change(msgspec.Struct, frozen=True):
    """More or less memory of one category in one block of the model."""

    category: str
    module: str
    phase: str
    size_bytes: int
    operators: tuple[tuple[str, int], ...]
    """Those that changed, with the bytes of each, the largest change first."""
    inside: tuple[str, ...]
    """Parts of the block that changed, the largest change first."""


def memory_finding(before: Before, now: Record) -> Finding | None:
    """Return the difference in memory; None if there is none."""
    phase, change, old = _moved_peak(before.metrics, now.metrics)
    if change == 0 or old <= 0:
        return None
    what = "peak" if phase == "" else f"peak in {phase}"
    changes = _changes(before.profile, now.profile)
    if changes:
        places = _places(changes, change, before.profile, now.profile)
        rest = _untouched(before.profile, now.profile)
        details = [_detail(each, before.profile, now.profile) for each in changes[:_MOST_DETAILS]]
    else:
        by_category = _by_metrics(before.metrics, now.metrics)
        places = ", ".join(f"{name} {sizes.change(value, 'bytes')}" for name, value in by_category[:3])
        rest, details = "", []
    line = f"{what} {sizes.change(change, 'bytes')}{': ' if places else ''}{places}{rest if places else ''}"
    return Finding(
        resource="memory",
        share=abs(change) / old,
        worse=change > 0,
        line=line,
        placed=bool(changes),
        details=tuple(details),
    )


def _moved_peak(old: Mapping[str, Metric], new: Mapping[str, Metric]) -> tuple[str, int, int]:
    """Return the step's peak if it moved, else that of the phase that moved most: the phase, the change and the old value in bytes."""
    found = []
    for name in sorted({*old} & {*new}):
        if name.startswith("peak_") and name.endswith(_SUFFIX) and "load" not in name and "requested" not in name:
            phase = name.removeprefix("peak").removesuffix("bytes").strip("_")
            found.append((phase, int(new[name].value) - int(old[name].value), int(old[name].value)))
    whole = [each for each in found if each[0] == "" and each[1]]
    return max(whole or found, key=lambda each: abs(each[1]), default=("", 0, 0))


def _by_metrics(old: Mapping[str, Metric], new: Mapping[str, Metric]) -> list[tuple[str, int]]:
    """Return the changes by category from the metrics alone, the largest first."""
    names = sorted(name for name in {*old, *new} if name.startswith(_PREFIX) and _ROUNDING not in name)
    changes = [
        (name.removeprefix(_PREFIX).removesuffix(_SUFFIX), _value(new, name) - _value(old, name)) for name in names
    ]
    return sorted((each for each in changes if each[1]), key=lambda each: -abs(each[1]))


def _value(metrics: Mapping[str, Metric], name: str) -> int:
    return int(metrics[name].value) if name in metrics else 0


def _changes(old: Profile | None, new: Profile | None) -> list[_Change]:
    """Return the change of every block, the largest first; [] where a side has no profile."""
    if old is None or new is None:
        return []
    grouped: dict[tuple[str, str, str], list[tuple[str, str, int]]] = {}
    for key, size in _difference(old, new).items():
        category, module, phase, maker = key
        # Memory with a module is grouped by its owner, whatever the phase it was made in.
        at = (category, block(module), "" if module else phase)
        grouped.setdefault(at, []).append((maker, parts(module), size))
    changes = [
        _Change(
            *at,
            sum(size for _, _, size in found),
            tuple(_totals((maker, size) for maker, _, size in found)),
            tuple(name for name, _ in _totals((inside, size) for _, inside, size in found) if name),
        )
        for at, found in grouped.items()
    ]
    return sorted((each for each in changes if each.size_bytes), key=lambda each: -abs(each.size_bytes))


def _difference(old: Profile, new: Profile) -> dict[tuple[str, str, str, str], int]:
    sums: dict[tuple[str, str, str, str], int] = {}
    for sign, profile in ((-1, old), (1, new)):
        for piece in profile.at_peak:
            sums[_key(piece)] = sums.get(_key(piece), 0) + sign * piece.size_bytes
    return {key: size for key, size in sums.items() if size}


def _key(piece: Piece) -> tuple[str, str, str, str]:
    return piece.category, piece.module, piece.phase, piece.operator


def _totals(items: object) -> list[tuple[str, int]]:
    sums: dict[str, int] = {}
    for name, size in items:  # type: ignore[attr-defined]
        sums[name] = sums.get(name, 0) + size
    return sorted(((name, size) for name, size in sums.items() if size), key=lambda each: -abs(each[1]))


def _places(changes: list[_Change], change: int, old: Profile | None, new: Profile | None) -> str:
    """Return the largest changes in the direction of the peak, by category: "activations +1.79 GiB in LlamaMLP (…) by mul, silu"."""
    same = [each for each in changes if (each.size_bytes > 0) == (change > 0)] or changes
    largest = leading(same, lambda one: one.size_bytes, share=_SHOWN_SHARE, most=2)
    return "; ".join(_detail(each, old, new, most=2) for each in largest)


def _detail(each: _Change, old: Profile | None, new: Profile | None, most: int = 5) -> str:
    where = label(each.module, each.phase, new, old)
    more = f" and {len(each.inside) - most} more" if len(each.inside) > most else ""
    inside = f": {', '.join(each.inside[:most])}{more}" if each.inside else ""
    return f"{each.category} {sizes.change(each.size_bytes, 'bytes')} in {where}{inside}{_makers(each, most)}"


def _makers(each: _Change, most: int) -> str:
    """Return which operators made it; for a held tensor, what it is and what it was."""
    more = [name for name, size in each.operators if (size > 0) == (each.size_bytes > 0) and name]
    less = [name for name, size in each.operators if (size > 0) != (each.size_bytes > 0) and name]
    if more and more[0].startswith(_HELD):
        was = f", in place of {less[0].removeprefix(_HELD)}" if less and less[0].startswith(_HELD) else ""
        return f" ({more[0]}{was})"
    named = dict.fromkeys(operator(name) for name in more)
    names = sorted(named, key=lambda name: not computes(name))[:most]
    return f" by {', '.join(names)}" if names else ""


def _untouched(old: Profile | None, new: Profile | None) -> str:
    """Return the large categories that did not change."""
    assert old is not None
    assert new is not None
    totals = [_categories(profile) for profile in (old, new)]
    same = [name for name in ("weights", "adapter", "optimizer", "kv_cache") if _same(totals, name)]
    return f"; {', '.join(same)} as before" if same else ""


def _categories(profile: Profile) -> dict[str, int]:
    sums: dict[str, int] = {}
    for piece in profile.at_peak:
        sums[piece.category] = sums.get(piece.category, 0) + piece.size_bytes
    return sums


def _same(totals: list[dict[str, int]], name: str) -> bool:
    before, after = (each.get(name, 0) for each in totals)
    return bool(before) and before == after
