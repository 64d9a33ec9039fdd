"""What is run more or less often: modules that came, went, changed their class or ran again, and operators by module."""

from __future__ import annotations

import msgspec

from hpc_core.explain.before import Before
from hpc_core.explain.finding import Finding, leading
from hpc_core.explain.naming import block, computes, label, operator
from hpc_core.record import units as sizes
from hpc_core.record.profile import Profile
from hpc_core.record.record import Record

__all__ = ["module_changes", "work_finding"]

_SHOWN_SHARE = 0.2
_MOST_DETAILS = 12


class _Change(msgspec.Struct, frozen=True):
    """Operators more or less in one block of the model."""

    module: str
    phase: str
    operators: tuple[tuple[str, int], ...]

    @property
    def size(self) -> int:
        """How many more or less, signs aside."""
        return sum(abs(times) for _, times in self.operators)


def work_finding(before: Before, now: Record) -> Finding | None:
    """The difference in operators and FLOPs; None if there is none."""
    counts = _counts(before, now)
    changes = _changes(before.profile, now.profile)
    if not counts and not changes:
        return None
    heads = [text for _, text in counts] or ["operators by module"]
    shares = [share for share, _ in counts] or [0.0]
    told = "; ".join(
        _told(each, before.profile, now.profile, most=3)
        for each in leading(changes, lambda one: one.size, share=_SHOWN_SHARE, most=2)
    )
    details = tuple(_told(each, before.profile, now.profile, most=8) for each in changes[:_MOST_DETAILS])
    line = ", ".join(heads[:2]) + (f": {told}" if told else "")
    share = max(shares, key=abs)
    return Finding(resource="work", share=abs(share), worse=share > 0, line=line, placed=bool(changes), details=details)


def _counts(before: Before, now: Record) -> list[tuple[float, str]]:
    """Operators and FLOPs that changed: by which share, and in words."""
    found = []
    for name in ("operators", "flops"):
        old, new = before.metrics.get(name), now.metrics.get(name)
        if old is None or new is None or old.unit != new.unit or old.value == new.value:
            continue
        change = new.value - old.value
        share = change / old.value if old.value else 1.0
        said = f"{sizes.change(change, old.unit)}, {sizes.percent(change / old.value)}" if old.value else "from 0"
        found.append((share, f"{'FLOPs' if name == 'flops' else name} {said}"))
    return found


def _changes(old: Profile | None, new: Profile | None) -> list[_Change]:
    if old is None or new is None:
        return []
    sums: dict[tuple[str, str, str], int] = {}
    for sign, profile in ((-1, old), (1, new)):
        for use in profile.operators:
            key = (block(use.module), "" if use.module else use.phase, operator(use.operator))
            sums[key] = sums.get(key, 0) + sign * use.times
    grouped: dict[tuple[str, str], list[tuple[str, int]]] = {}
    for (module, phase, name), times in sums.items():
        if times:
            grouped.setdefault((module, phase), []).append((name, times))
    changes = [
        _Change(*at, tuple(sorted(each, key=lambda one: (not computes(one[0]), -abs(one[1]), one[0]))))
        for at, each in grouped.items()
    ]
    return sorted(changes, key=lambda each: (-each.size, each.module))


def _told(each: _Change, old: Profile | None, new: Profile | None, *, most: int) -> str:
    names = ", ".join(f"{name} {times:+,}" for name, times in each.operators[:most])
    return f"{names} in {label(each.module, each.phase, new, old)}"


def module_changes(old: Profile | None, new: Profile | None) -> tuple[str, ...]:
    """What became of the modules, the most telling first: another class, new or gone, run again or no more."""
    if old is None or new is None:
        return ()
    both = sorted({*old.modules} & {*new.modules})
    others = [path for path in both if old.modules[path].kind != new.modules[path].kind]
    said = [
        f"{path.removeprefix('model.')} is {new.modules[path].kind}, was {old.modules[path].kind}" for path in others
    ]
    came = sorted({*new.modules} - {*old.modules})
    went = sorted({*old.modules} - {*new.modules})
    found = [
        *_several(said, 2),
        *_several([f"new: {path}" for path in came], 2),
        *_several([f"gone: {path}" for path in went], 2),
    ]
    again = [path for path in both if old.modules[path].calls != new.modules[path].calls]
    if again:
        # The one with the most below it stands for all of them.
        path = max(again, key=lambda one: (sum(other.startswith(f"{one}.") for other in again), -len(one)))
        found.append(_again(path, old, new))
    return tuple(found)


def _several(said: list[str], most: int) -> list[str]:
    if len(said) <= most:
        return said
    return [*said[:most], f"and {len(said) - most} modules more"]


def _again(path: str, old: Profile, new: Profile) -> str:
    was, now = old.modules[path], new.modules[path]
    text = f"forwards of {now.kind} ({path}) {was.calls:,} → {now.calls:,}"
    if was.calls == 2 * was.count and now.calls == now.count:
        return f"{text}: no longer recomputed"
    if was.calls == was.count and now.calls == 2 * now.count:
        return f"{text}: each ran twice"
    return text
