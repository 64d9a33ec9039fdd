"""What a report shows of one case on one machine: its newest record, the sessions before, and what the gate says. Draws nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec

from hpc_core.baselines.baseline import Baseline, Damaged
from hpc_core.baselines.history import sessions
from hpc_core.baselines.lookup import find
from hpc_core.baselines.over_time import moment
from hpc_core.case.errors import BaselineError
from hpc_core.explain.before import stored_before
from hpc_core.explain.explain import Cause, explain
from hpc_core.gate.busy import sessions_of_regime
from hpc_core.gate.judge import judge
from hpc_core.gate.verdict import Judgement, Verdict, share
from hpc_core.record.record import Metric, Record
from hpc_core.report.growth import grown
from hpc_core.report.row import Row

__all__ = ["BUSY", "WALL", "Entry", "Spread", "entries_of"]

BUSY = ("busy_s", "busy_decode_token_s")
"""GPU-busy seconds of a step, or of a decoded token: a case has one of them."""
WALL = ("step_s", "decode_token_s", "query_s")
"""What a clock on the host saw, the first that is there."""


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """The range that a value takes over processes and sessions; no confidence interval, since they are few."""

    low: float
    high: float
    count: int
    """Values it is the range of, at least two."""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One case on one machine."""

    record: Record
    """The newest one."""
    past: tuple[Record, ...]
    """Sound records of the very same case (by digest) on this machine, oldest first, the newest included."""
    judgement: Judgement | None = None
    """None where no baselines were named."""
    grown: tuple[str, ...] = ()
    """What holds more memory at the peak than in the last accepted record, the largest first."""
    cause: Cause | None = None
    """Why it is not as its baseline, as the suite says it; None where it is, where it failed, and where none is sound."""

    @property
    def row(self) -> Row:
        """The same as a row of the terminal's table."""
        return Row(record=self.record, judgement=self.judgement, grown=self.grown, cause=self.cause)

    @property
    def case(self) -> str:
        """The case's id."""
        return self.record.case.id

    @property
    def machine(self) -> str:
        """The machine's key; "predicted" where nothing ran."""
        return self.record.circumstances.machine.key

    @property
    def is_predicted(self) -> bool:
        """Whether its numbers were predicted on fake tensors."""
        return self.machine == "predicted" or "predicted" in self.record.circumstances.gpu

    @property
    def metrics(self) -> dict[str, Metric]:
        """The numbers of a sound record; none of one that failed or is invalid."""
        return self.record.metrics if self.record.status == "ok" else {}

    @property
    def needs_a_look(self) -> bool:
        """Whether it is worse, better, broken or cannot be compared: everything but an unmoved case."""
        if self.record.status != "ok":
            return True
        return self.judgement is not None and self.judgement.verdict is not Verdict.PASS

    def value(self, *names: str) -> float | None:
        """Of the first of these metrics that is there."""
        name = self.name_of(*names)
        return None if name is None else float(self.metrics[name].value)

    def name_of(self, *names: str) -> str | None:
        """The first of these metrics that is there."""
        return next((name for name in names if name in self.metrics), None)

    def spread(self, *names: str) -> Spread | None:
        """The range of the first of these metrics; None of a single value.

        Rounds within one process are no replicates: of wall time each session gives its median.
        """
        name = self.name_of(*names)
        if name is None:
            return None
        values = [value for record in self.past for value in _replicates(record.metrics.get(name), self.metrics[name])]
        return Spread(low=min(values), high=max(values), count=len(values)) if len(values) > 1 else None


def _replicates(metric: Metric | None, like: Metric) -> Sequence[float]:
    if metric is None or (metric.unit, metric.noise) != (like.unit, like.noise):
        return ()
    if metric.noise == "busy" and metric.samples:
        return metric.samples
    return (float(metric.value),)


def entries_of(records: Iterable[Record], baselines: Path | None = None) -> tuple[Entry, ...]:
    """An entry a case and machine, by machine and id, numbers in it by size; judged by `baselines` where they are named."""
    grouped: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        grouped.setdefault((record.circumstances.machine.key, record.case.id), []).append(record)
    judged = None if baselines is None else partial(_judged, baselines, share(max(1, len(grouped))))
    entries = []
    for _, group in sorted(grouped.items(), key=lambda each: (each[0][0], _in_order(each[0][1]))):
        group.sort(key=lambda record: moment(record.circumstances.started_at))
        newest = group[-1]
        past = tuple(each for each in group if each.status == "ok" and each.case.digest == newest.case.digest)
        found = _Judged() if judged is None else judged(newest)
        entries.append(Entry(record=newest, past=past, judgement=found.judgement, grown=found.grown, cause=found.cause))
    return tuple(entries)


def _in_order(name: str) -> list[tuple[int, str]]:
    """A key that puts -b4 before -b16. Digits are compared by their count first: a number of any length is never made of them."""
    parts = re.split(r"([0-9]+)", name)
    return [(len(part.lstrip("0")) if at % 2 else 0, part) for at, part in enumerate(parts)]


class _Judged(NamedTuple):
    judgement: Judgement | None = None
    grown: tuple[str, ...] = ()
    cause: Cause | None = None


def _judged(baselines: Path, alpha: float, record: Record) -> _Judged:
    """The verdict as the suite gives it, without waivers; what grew since the last accepted record, and why."""
    key, case_id = record.circumstances.machine.key, record.case.id
    lookup = find(baselines, key, case_id)
    if not isinstance(lookup, Baseline):
        return _Judged(judge(record, lookup, alpha=alpha))
    try:
        kept = sessions(baselines, key, case_id, digest=record.case.digest)
    except BaselineError as error:
        damaged = Damaged(path=f"the history of {case_id}", reason=str(error))
        return _Judged(judge(record, damaged, alpha=alpha))
    found = sessions_of_regime([session.metrics for session in kept], lookup.metrics)
    judgement = judge(record, lookup, sessions=found, alpha=alpha)
    if record.failure is not None or judgement.verdict is Verdict.PASS:
        return _Judged(judgement)
    before = stored_before(baselines, key, lookup)
    assert before is not None  # the baseline is sound
    last = before.record if judgement.verdict is Verdict.REGRESSED else None
    return _Judged(judgement, () if last is None else grown(last, record), explain(before, record, judgement))
