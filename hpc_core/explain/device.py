"""What the GPU did longer or more often: busy time, gaps, families of kernels, and kernels by module where both sides know them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hpc_core.explain.before import Before
from hpc_core.explain.finding import Finding, leading
from hpc_core.explain.naming import block, label
from hpc_core.record import units as sizes
from hpc_core.record.profile import KernelUse, Profile
from hpc_core.record.record import Metric, Record

__all__ = ["device_finding"]

_BUSY = ("busy_s", "busy_decode_token_s", "busy_prefill_s")
_COUNTS = ("kernels", "copies", "memsets", "synchronizations")
_WORTH = 0.005
"""Of busy time; less is the noise of one process."""
_NOTABLE = 0.001
"""Of the time of all kernels: a change of time alone below it is no cause of anything."""
_SLOWER = 0.05
_PLAINLY_SLOWER = 0.25
"""Of its own time: with as many launches as before, no kernel on a GPU is so much slower by noise alone."""
_SHOWN_SHARE = 0.2
_MOST_DETAILS = 12
_Sums = dict[str, tuple[int, float]]


def device_finding(before: Before, now: Record) -> Finding | None:
    """The difference in time on the device and in launches; None if there is none, or no GPU."""
    times = _times(before.metrics, now.metrics)
    counts = _counts(before.metrics, now.metrics)
    if not times and not counts:
        return None
    by_module = _by_module(before.profile, now.profile)
    told = by_module or _by_family(before.record, now)
    heads = [text for _, text in (*times[:1], *counts[:2])]
    line = ", ".join(heads) + (f": {'; '.join(told[:2])}" if told else "")
    details = (*told[2:_MOST_DETAILS], *_kernels(before.profile, now.profile), *_gaps(before.metrics, now.metrics))
    share = max((share for share, _ in (*times[:1], *counts)), key=abs)
    return Finding(
        resource="device", share=abs(share), worse=share > 0, line=line, placed=bool(by_module), details=details
    )


def _times(old: Mapping[str, Metric], new: Mapping[str, Metric]) -> list[tuple[float, str]]:
    """Busy times that changed, the most first: by which share of what was, and in words."""
    found = []
    for name in _BUSY:
        if name in old and name in new and old[name].value > 0:
            change = new[name].value - old[name].value
            share = change / old[name].value
            if abs(share) >= _WORTH:
                found.append((share, f"{name} {sizes.change(change, 's')}, {sizes.percent(share)}"))
    return sorted(found, key=lambda each: -abs(each[0]))


def _counts(old: Mapping[str, Metric], new: Mapping[str, Metric]) -> list[tuple[float, str]]:
    found = []
    for name in _COUNTS:
        if name in old and name in new and old[name].unit == new[name].unit:
            change = new[name].value - old[name].value
            if change:
                share = change / old[name].value if old[name].value else 1.0
                found.append((share, f"{name} {sizes.change(change, old[name].unit)}"))
    return found


def _by_family(old: Record | None, new: Record) -> list[str]:
    """Families of kernels that changed, the most seconds first; from totals, where no module is known."""
    if old is None or not old.kernel_families or not new.kernel_families:
        return []
    before: _Sums = {name: (each.kernels, each.seconds) for name, each in old.kernel_families.items()}
    after: _Sums = {name: (each.kernels, each.seconds) for name, each in new.kernel_families.items()}
    return [_difference(name, before.get(name), after.get(name)) for name in _moved(before, after)]


def _by_module(old: Profile | None, new: Profile | None) -> list[str]:
    """Blocks of the model whose kernels changed, each with the families that did."""
    if old is None or new is None or not old.kernels or not new.kernels:
        return []
    before, after = (_sums(profile.kernels, _place) for profile in (old, new))
    said = []
    for key in _moved(before, after):
        module, _, family = key.rpartition("\t")
        text = _difference(family, before.get(key), after.get(key))
        said.append(f"{text} in {label(module, '', new, old)}")
    return said


def _kernels(old: Profile | None, new: Profile | None) -> list[str]:
    """Single kernels: new, gone, slower for a launch, or launched otherwise."""
    if old is None or new is None or not old.kernels or not new.kernels:
        return []
    before, after = (_sums(profile.kernels, lambda use: use.kernel) for profile in (old, new))
    return [_kind(name, before.get(name), after.get(name)) for name in _moved(before, after)[:_MOST_DETAILS]]


def _place(use: KernelUse) -> str:
    return f"{block(use.module)}\t{use.family}"


def _sums(uses: Iterable[KernelUse], key: object) -> _Sums:
    sums: _Sums = {}
    for use in uses:
        name = key(use)  # type: ignore[operator]
        launches, seconds = sums.get(name, (0, 0.0))
        sums[name] = (launches + use.launches, seconds + use.seconds)
    return sums


def _moved(before: _Sums, after: _Sums) -> list[str]:
    """Those that changed: the most seconds first, and with the same launches only beyond what time alone varies by."""
    whole_s = sum(seconds for _, seconds in before.values())

    def launches(name: str) -> int:
        return after.get(name, (0, 0.0))[0] - before.get(name, (0, 0.0))[0]

    def seconds(name: str) -> float:
        return after.get(name, (0, 0.0))[1] - before.get(name, (0, 0.0))[1]

    def slower(name: str, share: float) -> bool:
        return abs(seconds(name)) > share * max(before.get(name, (0, 0.0))[1], after.get(name, (0, 0.0))[1])

    # What is launched otherwise is certain, and so is what takes a plain part of the whole; else time alone may be noise, and comes after it.
    surely = [
        name
        for name in {*before, *after}
        if launches(name) or (slower(name, _PLAINLY_SLOWER) and abs(seconds(name)) > _WORTH * whole_s)
    ]
    rest = [
        name
        for name in {*before, *after}
        if name not in surely and slower(name, _SLOWER) and abs(seconds(name)) > _NOTABLE * whole_s
    ]
    return sorted(surely, key=lambda name: (-abs(seconds(name)), name)) + leading(
        sorted(rest), seconds, share=_SHOWN_SHARE, most=3
    )


def _difference(name: str, was: tuple[int, float] | None, now: tuple[int, float] | None) -> str:
    old, new = was or (0, 0.0), now or (0, 0.0)
    launches = f" ({new[0] - old[0]:+,} launches)" if new[0] != old[0] else ""
    return f"{name} kernels {sizes.change(new[1] - old[1], 's')}{launches}"


def _kind(name: str, was: tuple[int, float] | None, now: tuple[int, float] | None) -> str:
    if was is None and now is not None:
        return f"new: {name}, {now[0]:,} launches, {sizes.quantity(now[1], 's')}"
    if now is None and was is not None:
        return f"gone: {name}, {was[0]:,} launches, {sizes.quantity(was[1], 's')}"
    assert was is not None
    assert now is not None
    if was[0] != now[0]:
        return f"launched {was[0]:,} → {now[0]:,} times: {name}"
    each = sizes.pair(was[1] / was[0], now[1] / now[0], "s")
    return f"{'slower' if now[1] > was[1] else 'faster'}: {name}, {each} a launch"


def _gaps(old: Mapping[str, Metric], new: Mapping[str, Metric]) -> list[str]:
    """Wall time in which the device waited, of a step."""
    if not all(name in metrics for name in ("step_s", "busy_s") for metrics in (old, new)):
        return []
    before, after = (metrics["step_s"].value - metrics["busy_s"].value for metrics in (old, new))
    return [f"gaps between kernels, of a step: {sizes.pair(before, after, 's')} (by the wall clock of one process)"]
