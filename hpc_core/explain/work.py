"""Find what runs more or less often: modules that are new, gone, of another class or run again, and operators by module."""

from __future__ import annotations

import msgspec

from hpc_core.explain.before import Before
from hpc_core.explain.findings import Finding, block, changed_counts, computes, label, leading, operator
from hpc_core.record import units as sizes
from hpc_core.record.profile import Profile
from hpc_core.record.record import Record

_SHOWN_SHARE = 0.2
_MOST_DETAILS = 12


class _Change(msgspec.Struct, frozen=True):
    """More or fewer operators in one block of the model."""

    module: str
    phase: str
    operators: tuple[tuple[str, int], ...]

    @property
    def size(self) -> int:
        """How many more or fewer, regardless of sign."""
        return sum(abs(times) for _, times in self.operators)


def work_finding(before: Before, now: Record) -> Finding | None:
    """Return the difference in operators and FLOPs; None if there is none."""
    counts = _counts(before, now)
    changes = _changes(before.profile, now.profile)
    if not counts and not changes:
        return None
    heads = [text for _, text in counts] or ["operators by module"]
    shares = [share for share, _ in counts] or [0.0]
    places = "; ".join(
        _place(each, before.profile, now.profile, most=3)
        for each in leading(changes, lambda one: one.size, share=_SHOWN_SHARE, most=2)
    )
    details = tuple(_place(each, before.profile, now.profile, most=8) for each in changes[:_MOST_DETAILS])
    line = ", ".join(heads[:2]) + (f": {places}" if places else "")
    share = max(shares, key=abs)
    return Finding(resource="work", share=abs(share), worse=share > 0, line=line, placed=bool(changes), details=details)


def recompiled_finding(before: Before, now: Record) -> Finding | None:
    """Return why torch.compile compiles functions again more often, with guard and function; None if it does not."""
    old, new = (metrics.get("recompilations") for metrics in (before.metrics, now.metrics))
    change = 0.0 if new is None else new.value - (0 if old is None else old.value)
    if new is None or change <= 0:
        return None
    line = f"recompilations {sizes.change(change, new.unit)}{'' if new.note is None else f': {new.note}'}"
    return Finding(resource="work", share=1.0, worse=True, line=line, placed=new.note is not None)


def _counts(before: Before, now: Record) -> list[tuple[float, str]]:
    """Return operators and FLOPs, where they changed: the share, and its text."""
    texts = []
    for name, change, share in changed_counts(before.metrics, now.metrics, ("operators", "flops")):
        old = before.metrics[name]
        size = f"{sizes.change(change, old.unit)}, {sizes.percent(share)}" if old.value else "from 0"
        texts.append((share, f"{'FLOPs' if name == 'flops' else name} {size}"))
    return texts


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


def _place(each: _Change, old: Profile | None, new: Profile | None, *, most: int) -> str:
    names = ", ".join(f"{name} {times:+,}" for name, times in each.operators[:most])
    return f"{names} in {label(each.module, each.phase, new, old)}"


def module_changes(old: Profile | None, new: Profile | None) -> tuple[str, ...]:
    """Return what changed about modules, the most important first: another class, new or gone, run again or no longer."""
    if old is None or new is None:
        return ()
    both = sorted({*old.modules} & {*new.modules})
    others = [path for path in both if old.modules[path].kind != new.modules[path].kind]
    renamed = [
        f"{path.removeprefix('model.')} is {new.modules[path].kind}, was {old.modules[path].kind}" for path in others
    ]
    came = sorted({*new.modules} - {*old.modules})
    went = sorted({*old.modules} - {*new.modules})
    found = [
        *_several(renamed, 2),
        *_several([f"new: {path}" for path in came], 2),
        *_several([f"gone: {path}" for path in went], 2),
    ]
    again = [path for path in both if old.modules[path].calls != new.modules[path].calls]
    if again:
        # The one with the most modules below it stands for all of them.
        path = max(again, key=lambda one: (sum(other.startswith(f"{one}.") for other in again), -len(one)))
        found.append(_again(path, old, new))
    return tuple(found)


def _several(texts: list[str], most: int) -> list[str]:
    if len(texts) <= most:
        return texts
    return [*texts[:most], f"and {len(texts) - most} modules more"]


def _again(path: str, old: Profile, new: Profile) -> str:
    was, now = old.modules[path], new.modules[path]
    text = f"forwards of {now.kind} ({path}) {was.calls:,} → {now.calls:,}"
    if was.calls == 2 * was.count and now.calls == now.count:
        return f"{text}: no longer recomputed"
    if was.calls == was.count and now.calls == 2 * now.count:
        return f"{text}: each ran twice"
    return text
