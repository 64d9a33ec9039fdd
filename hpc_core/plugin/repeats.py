"""How many processes a case gets: further ones run until the plan is done. Knows no pytest."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec

from hpc_core.record.record import Record
from hpc_core.record.repeats import busy_values, merged

Enough = Callable[[Sequence[float]], bool]
"""Whether the samples of one busy metric, one a process, suffice."""
DEFAULT_ON_GPU = 3
MOST = 12
"""No more processes than this, however wide the samples still spread."""
HALF_WIDTH = 0.0025
"""Half the range over the median: 0.25 %, about the spread of GPU-busy time between processes on one H100."""


def narrow(values: Sequence[float]) -> bool:
    """Whether at least three samples lie within 0.25 % of the middle of their range."""
    return len(values) >= DEFAULT_ON_GPU and (max(values) - min(values)) / 2 <= HALF_WIDTH * statistics.median(values)


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for: `--perf-processes` and `--perf-budget`."""

    processes: int | Literal["auto"] = "auto"
    """In total, a case. "auto": three on a GPU, one elsewhere; with a budget as many more as it takes."""
    budget_s: float | None = None
    """No further process starts once the session is so old; None: no limit, and no more than `processes`."""

    def total(self, record: Record) -> int:
        """How many processes a case that gave this record should have at least."""
        if self.processes != "auto":
            return self.processes
        return DEFAULT_ON_GPU if busy_values(record) else 1

    @property
    def open_ended(self) -> bool:
        """Whether spread decides how many processes there are beyond the least."""
        return self.processes == "auto" and self.budget_s is not None


def replicated(
    first: Record,
    run: Callable[[int, int], Record],
    plan: Plan,
    *,
    enough: Enough = narrow,
    keep: Callable[[Record], None] = lambda _: None,
    began: float = 0.0,
    clock: Callable[[], float] = time.monotonic,
) -> Record:
    """The record of this case after the further processes that the plan asks for.

    Args:
        first: of the full process, or merged already: then only what is missing runs.
        run: gives the record of one further process, told its number (from 2) and of how many; 0 if nobody knows yet.
        plan: how many, and for how long.
        enough: asked after each further process beyond the least, for every busy metric.
        keep: told the record after each further process, for a run that is cut off.
        began: when the session began, by `clock`.
        clock: seconds.
    """
    record, least = first, plan.total(first)
    done = max(1, len(first.processes))
    spent = False
    while record.status == "ok":
        more = done < least or (plan.open_ended and done < MOST and _is_wide(record, enough))
        spent = plan.budget_s is not None and clock() - began >= plan.budget_s
        if not more or spent:
            break
        done += 1
        record = merged(record, [run(done, least if done <= least else 0)])
        keep(record)
    return _told_of_budget(record, done, least) if spent and done < least else record


def _is_wide(record: Record, enough: Enough) -> bool:
    """No samples are never too few: a CPU has no busy time."""
    return not all(enough(values) for values in busy_values(record).values())


def _told_of_budget(record: Record, done: int, least: int) -> Record:
    note = f"the time budget ended with {done} of {least} processes of {record.case.id}: raise --perf-budget for narrower times"
    seen = msgspec.structs.replace(record.circumstances, notes=(*record.circumstances.notes, note))
    return msgspec.structs.replace(record, circumstances=seen)
