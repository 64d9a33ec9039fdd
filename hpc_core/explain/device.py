"""Find what the GPU did longer or more often: busy time, gaps, families of kernels, and kernels by module where both sides know them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hpc_core.explain.before import Before
from hpc_core.explain.findings import Finding, block, changed_counts, label, leading
from hpc_core.record import units as sizes
from hpc_core.record.metrics import METRICS
from hpc_core.record.profile import KernelUse, Profile
from hpc_core.record.record import Metric, Record

_BUSY = tuple(name for name, each in METRICS.items() if each.family is not None)
_COUNTS = ("kernels", "copies", "memsets", "launches", "synchronizations", "device_allocations", "device_frees")
_WORTH = 0.005
"""Share of busy time; less is the noise of one process."""
_NOTABLE = 0.001
"""Share of the time of all kernels: a smaller change of time alone is not a cause."""
_SLOWER = 0.05
_CERTAINLY_SLOWER = 0.25
"""Share of a kernel's own time: with as many launches as before, noise alone does not make a kernel so much slower."""
_SHOWN_SHARE = 0.2
_MOST_DETAILS = 12
_Sums = dict[str, tuple[int, float]]


def device_finding(before: Before, now: Record) -> Finding | None:
    """Return the difference in time on the device and in launches; None if there is none, or no GPU."""
    times = _times(before.metrics, now.metrics)
    counts = _counts(before.metrics, now.metrics)
    if not times and not counts:
        return None
    by_module = _by_module(before.profile, now.profile)
    places = by_module or _by_family(before.record, now)
    heads = [text for _, text in (*times[:1], *counts[:2])]
    line = ", ".join(heads) + (f": {'; '.join(places[:2])}" if places else "")
    details = (*places[2:_MOST_DETAILS], *_kernels(before.profile, now.profile), *_gaps(before.metrics, now.metrics))
    share = max((share for share, _ in (*times[:1], *counts)), key=abs)
    return Finding(
        resource="device", share=abs(share), worse=share > 0, line=line, placed=bool(by_module), details=details
    )


def _times(old: Mapping[str, Metric], new: Mapping[str, Metric]) -> list[tuple[float, str]]:
    """Return the busy times that changed, the most first: the share, and its text."""
    found = []
    for name in _BUSY:
        if name in old and name in new and old[name].value > 0:
            change = new[name].value - old[name].value
            share = change / old[name].value
            if abs(share) >= _WORTH:
                found.append((share, f"{name} {sizes.change(change, 's')}, {sizes.percent(share)}"))
    return sorted(found, key=lambda each: -abs(each[0]))


def _counts(old: Mapping[str, Metric], new: Mapping[str, Metric]) -> list[tuple[float, str]]:
    """Return the counts that changed: the share, and its text."""
    changed = changed_counts(old, new, _COUNTS)
    return [(share, f"{name} {sizes.change(change, old[name].unit)}") for name, change, share in changed]


def _by_family(old: Record | None, new: Record) -> list[str]:
    """Return the families of kernels that changed, the most seconds first: from totals, where no module is known."""
    if old is None or not old.kernel_families or not new.kernel_families:
        return []
    before: _Sums = {name: (each.kernels, each.seconds) for name, each in old.kernel_families.items()}
    after: _Sums = {name: (each.kernels, each.seconds) for name, each in new.kernel_families.items()}
    return [_difference(name, before.get(name), after.get(name)) for name in _moved(before, after)]


def _by_module(old: Profile | None, new: Profile | None) -> list[str]:
    """Return the blocks of the model whose kernels changed, each with the families that did."""
    if old is None or new is None or not old.kernels or not new.kernels:
        return []
    before, after = (_sums(profile.kernels, _place) for profile in (old, new))
    texts = []
    for key in _moved(before, after):
        module, _, family = key.rpartition("\t")
        text = _difference(family, before.get(key), after.get(key))
        texts.append(f"{text} in {label(module, '', new, old)}")
    return texts


def _kernels(old: Profile | None, new: Profile | None) -> list[str]:
    """Return the single kernels that are new, gone, slower per launch, or launched more or less often."""
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
    """Return those that changed, the most seconds first; with the same launches only beyond what time alone varies by."""
    whole_s = sum(seconds for _, seconds in before.values())

    def launches(name: str) -> int:
        return after.get(name, (0, 0.0))[0] - before.get(name, (0, 0.0))[0]

    def seconds(name: str) -> float:
        return after.get(name, (0, 0.0))[1] - before.get(name, (0, 0.0))[1]

    def slower(name: str, share: float) -> bool:
        return abs(seconds(name)) > share * max(before.get(name, (0, 0.0))[1], after.get(name, (0, 0.0))[1])

    # Another number of launches is certain, and so is a large part of the whole time. Other changes of time may be noise: they come last.
    certain = [
        name
        for name in {*before, *after}
        if launches(name) or (slower(name, _CERTAINLY_SLOWER) and abs(seconds(name)) > _WORTH * whole_s)
    ]
    rest = [
        name
        for name in {*before, *after}
        if name not in certain and slower(name, _SLOWER) and abs(seconds(name)) > _NOTABLE * whole_s
    ]
    return sorted(certain, key=lambda name: (-abs(seconds(name)), name)) + leading(
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
    """Return how long the device waited in a step."""
    if not all(name in metrics for name in ("step_s", "busy_s") for metrics in (old, new)):
        return []
    before, after = (metrics["step_s"].value - metrics["busy_s"].value for metrics in (old, new))
    return [f"gaps between kernels, of a step: {sizes.pair(before, after, 's')} (by the wall clock of one process)"]
