"""How many processes a case gets: further ones run until the plan is done. Knows no pytest."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec

from hpc_core.baselines.baseline import gated_metrics
from hpc_core.record.record import Record
from hpc_core.record.repeats import busy_values, merged

Enough = Callable[[Sequence[float]], bool]
"""Return whether the samples of one busy metric, one per process, suffice."""
DEFAULT = 3
MOST = 12
"""The largest number of processes, however widely the samples spread."""
HALF_WIDTH = 0.0025
"""Half the range divided by the median: 0.25 %, about the spread of GPU-busy time between processes on one H100."""


def narrow(values: Sequence[float]) -> bool:
    """Return whether there are at least three samples, and half their range is at most 0.25 % of their median."""
    return len(values) >= DEFAULT and (max(values) - min(values)) / 2 <= HALF_WIDTH * statistics.median(values)


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The options `--perf-processes` and `--perf-budget`."""

    processes: int | Literal["auto"] = "auto"
    """Processes per case. "auto": one if it decides, else three; with a budget, more until times agree."""
    budget_s: float | None = None
    """No further process starts once the session has run for this long. None: no limit, and no more than `processes`."""

    def total(self, record: Record) -> int:
        """Return how many processes the case of this record needs at least."""
        if self.processes != "auto":
            return self.processes
        timed = any(metric.noise != "exact" for metric in gated_metrics(record).values())
        return DEFAULT if timed else 1

    @property
    def open_ended(self) -> bool:
        """Whether the spread of times decides how many more processes run."""
        return self.processes == "auto" and self.budget_s is not None


def replicated(
    first: Record,
    run: Callable[[int, int], Record],
    plan: Plan,
    *,
    enough: Enough = narrow,
    decided: Callable[[Record], bool] = lambda _: False,
    keep: Callable[[Record], None] = lambda _: None,
    began: float = 0.0,
    clock: Callable[[], float] = time.monotonic,
) -> Record:
    """Run the further processes that the plan requires, and return the merged record.

    Args:
        first: the record of the first process, or one that is merged already: then only the missing processes run.
        run: runs one further process. Takes its number (from 2) and the total; 0 if the total is not known yet.
        plan: how many processes, and for how long.
        enough: called for every busy metric, to decide whether more processes than the least are needed.
        decided: called with the first process's record under "auto" without a budget: whether further ones can be spared.
        keep: called with the record after each further process, so that an interrupted run loses nothing.
        began: when the session began, by `clock`.
        clock: returns seconds.
    """
    record, least = first, plan.total(first)
    done = max(1, len(first.processes))
    spent = False
    if plan.processes == "auto" and not plan.open_ended and done == 1 and first.status == "ok" and decided(first):
        return first
    while record.status == "ok":
        more = done < least or (plan.open_ended and done < MOST and _is_wide(record, enough))
        spent = plan.budget_s is not None and clock() - began >= plan.budget_s
        if not more or spent:
            break
        done += 1
        record = merged(record, [run(done, least if done <= least else 0)])
        keep(record)
    return _with_budget_note(record, done, least) if spent and done < least else record


def _is_wide(record: Record, enough: Enough) -> bool:
    """Return whether any busy metric needs more samples. A CPU has no busy time, so it never does."""
    return not all(enough(values) for values in busy_values(record).values())


def _with_budget_note(record: Record, done: int, least: int) -> Record:
    note = f"the time budget ended after {done} of {least} processes of {record.case.id}; raise --perf-budget for narrower times"
    circumstances = msgspec.structs.replace(record.circumstances, notes=(*record.circumstances.notes, note))
    return msgspec.structs.replace(record, circumstances=circumstances)
