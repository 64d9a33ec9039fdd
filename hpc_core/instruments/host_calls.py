"""What the host asked of the CUDA runtime while it was profiled: launches, copies, fills and waits, from the profiler's own records.

Host cost in seconds is noise; how often the host launches and waits is not. Pure: calls in, counts out.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["MARK", "MARKS", "HostCall", "kinds", "made_between", "steps_alike", "synchronizations"]

MARK = "cudaStreamQuery"
"""Asks a stream whether it is idle: waits for nothing, and torch asks it nowhere in a step."""
MARKS = 3
"""So many of them in a row end a step; one or two may be the case's own."""
_KINDS = (
    ("launch", re.compile(r"Launch(Cooperative)?Kernel")),
    ("graph", re.compile(r"GraphLaunch")),
    ("wait", re.compile(r"^cu(da)?(Device|Ctx|Stream|Event)Synchronize")),
    ("copy", re.compile(r"^cu(da)?Memcpy")),
    ("fill", re.compile(r"^cu(da)?Memset")),
    ("mark", re.compile(MARK)),
)


@dataclass(frozen=True)
class HostCall:
    """One call of the CUDA runtime or driver."""

    name: str
    correlation: int
    """One call can appear as a runtime call and as the driver call beneath it, with the same number."""
    start_ns: int


@functools.cache
def _kind(name: str) -> str | None:
    return next((kind for kind, pattern in _KINDS if pattern.search(name)), None)


def kinds(calls: Iterable[HostCall]) -> list[str]:
    """launch, graph, wait, copy, fill or mark for each call that is one, in the host's order, each call once."""
    seen: set[tuple[str, int]] = set()
    ordered = []
    for call in sorted(calls, key=lambda one: one.start_ns):
        kind = _kind(call.name)
        if kind is not None and (kind, call.correlation) not in seen:
            seen.add((kind, call.correlation))
            ordered.append(kind)
    return ordered


def made_between(ordered: Sequence[str]) -> list[str]:
    """The calls between the first launch and the last, which are the sentinels', without our wait for the first of them."""
    ends = [at for at, kind in enumerate(ordered) if kind == "launch"]
    inner = list(ordered[ends[0] + 1 : ends[-1]]) if len(ends) > 1 else []
    if "wait" in inner:
        inner.remove("wait")  # removes the first: we wait for the sentinel before the work begins
    return inner


def synchronizations(between: Sequence[str]) -> int:
    """How often the host waited for the device: for a stream, an event or all of it."""
    return sum(kind == "wait" for kind in between)


def steps_alike(between: Sequence[str], steps: int) -> bool:
    """Whether `steps` marked steps were seen and each launched, copied, filled and waited as often as the others."""
    counts: list[Counter[str]] = [Counter()]
    marks = 0
    for kind in between:
        marks = marks + 1 if kind == "mark" else 0
        if marks == MARKS:
            counts.append(Counter())
            marks = 0
        elif kind != "mark":
            counts[-1][kind] += 1
    *whole, rest = counts
    return len(whole) == steps and not rest and all(each == whole[0] for each in whole)
