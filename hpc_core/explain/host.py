"""Find what the host executes more or less often: bytecodes and calls in all, and the functions that they are in."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath

import msgspec

from hpc_core.explain.before import Before
from hpc_core.explain.findings import Finding, changed_counts, leading
from hpc_core.record import units as sizes
from hpc_core.record.metrics import METRICS
from hpc_core.record.profile import FunctionUse, Profile
from hpc_core.record.record import Record

_NAMES = tuple(name for name, each in METRICS.items() if each.explained == "host")
_SHOWN_SHARE = 0.2
_MOST_DETAILS = 12


class _Change(msgspec.Struct, frozen=True):
    """More or fewer bytecodes and calls in one function."""

    use: FunctionUse
    bytecodes: int
    calls: int
    c_calls: int

    @property
    def text(self) -> str:
        """Return it in words: function, file and line, and by how many bytecodes and calls."""
        counts = (("bytecodes", self.bytecodes), ("calls", self.calls), ("calls into C", self.c_calls))
        sizes_ = ", ".join(f"{count:+,} {name}" for name, count in counts if count)
        return f"{self.use.function} ({PurePosixPath(self.use.file).name}:{self.use.line}) {sizes_}"


def host_finding(before: Before, now: Record) -> Finding | None:
    """Return the difference in what the host executes; None if there is none, or if another Python ran."""
    if before.python.rpartition(".")[0] != now.circumstances.python.rpartition(".")[0]:
        return None
    counts = changed_counts(before.metrics, now.metrics, _NAMES)
    if not counts:
        return None
    changes = _changes(before.profile, now.profile)
    places = leading(changes, lambda one: one.bytecodes or one.c_calls, share=_SHOWN_SHARE, most=2)
    heads = [f"{name} {sizes.change(change, before.metrics[name].unit)}" for name, change, _ in counts[:1]]
    line = ", ".join(heads) + (f": {'; '.join(each.text for each in places)}" if places else "")
    details = tuple(each.text for each in changes[:_MOST_DETAILS])
    share = max((share for _, _, share in counts), key=abs)
    return Finding(resource="host", share=abs(share), worse=share > 0, line=line, placed=bool(changes), details=details)


def _changes(old: Profile | None, new: Profile | None) -> list[_Change]:
    """Return the functions that execute more or less, the largest change first.

    A function is known by its file and name, since lines move.
    """
    if old is None or new is None or not old.functions or not new.functions:
        return []
    before, after = (_by_name(profile.functions) for profile in (old, new))
    found = []
    for key in {*before, *after}:
        was, now = before.get(key), after.get(key)
        use = now or was
        assert use is not None
        counts = ((each.bytecodes, each.calls, each.c_calls) if each else (0, 0, 0) for each in (was, now))
        moved = [later - earlier for earlier, later in zip(*counts, strict=True)]
        if any(moved):
            found.append(_Change(use, *moved))
    return sorted(
        found, key=lambda each: (-abs(each.bytecodes), -abs(each.calls), -abs(each.c_calls), each.use.function)
    )


def _by_name(uses: Iterable[FunctionUse]) -> dict[tuple[str, str, str], FunctionUse]:
    return {(use.work, use.file, use.function): use for use in uses}
