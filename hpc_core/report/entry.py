"""What a report is made of: an entry for each case and machine, with its record, its earlier sessions and the gate's verdict; and its cells as text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec

from hpc_core.baselines.baseline import Acceptance, Baseline, Change, Damaged
from hpc_core.baselines.history import sessions
from hpc_core.baselines.lookup import find
from hpc_core.baselines.over_time import moment
from hpc_core.case.errors import BaselineError
from hpc_core.explain.before import stored_before
from hpc_core.explain.explain import Cause, explain
from hpc_core.gate.busy import sessions_of_regime
from hpc_core.gate.judge import judge
from hpc_core.gate.verdict import Judgement, MetricVerdict, Verdict, share
from hpc_core.record import units
from hpc_core.record.record import Metric, Record
from hpc_core.report.command import Command

BUSY = ("busy_s", "busy_decode_token_s")
"""GPU-busy seconds of a step, or of a decoded token: a case has one of them."""
WALL = ("step_s", "decode_token_s", "query_s")
"""Seconds by the host's clock; the first one that a record holds is shown."""
NOTHING = "-"
"""A cell without a value."""
ONLY_SHOWN = "*"
"""Marks a number that is not judged in a case of which others are."""

_SHARES = (("mfu", "MFU"), ("mbu", "MBU"))
_LEADING = ("peak_bytes", "busy_s", "busy_decode_token_s", "step_s", "query_s")
"""Whose change is shown where no metric is worse than allowed."""
_WORTH_SAYING_BYTES = 2**20


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One case in a table: its record, verdict and acceptance, and the cells that show them."""

    record: Record
    judgement: Judgement | None = None
    """None if nothing was judged, as with `hpc-core run`."""
    acceptance: Acceptance | None = None
    """Set if the record became the baseline."""
    refused: str | None = None
    """Why the record was not accepted as the baseline, although that was asked for."""
    grown: tuple[str, ...] = ()
    """What holds more memory at the peak than in the last accepted record, largest growth first."""
    cause: Cause | None = None
    """Why it differs from its baseline, if it does."""
    expired: tuple[str, ...] = ()
    """One sentence for each expired waiver of this case."""
    command: Command | None = None
    """Runs this case alone; None if its id is enough."""
    good_commit: str | None = None
    """The commit whose numbers the baseline holds, if it is known."""

    @property
    def case(self) -> str:
        """Return the case's id."""
        return self.record.case.id

    @property
    def verdict(self) -> str:
        """Return the word in the table: the gate's verdict, or how the run ended."""
        failure = self.record.failure
        if failure is not None:
            return "MISSING" if failure.kind in ("missing_library", "missing_data") else "BROKEN"
        if self.refused is not None:
            return "REFUSED"
        if self._is_accepted:
            assert self.acceptance is not None
            return {"created": "NEW", "updated": "UPDATED", "unchanged": "UNCHANGED"}[self.acceptance.action]
        if self.judgement is not None:
            return self.judgement.verdict.value
        return "OK" if self.record.status == "ok" else "INVALID"

    @property
    def commands(self) -> Command:
        """Return what runs this case alone, and what accepts it."""
        return self.command or Command(case=self.case, fault=self.record.circumstances.fault)

    @property
    def search(self) -> str:
        """Return the command that finds the commit which made the case worse, with its purpose; empty if no commit lies between."""
        seen, judgement = self.record.circumstances, self.judgement
        if judgement is None or judgement.verdict is not Verdict.REGRESSED or seen.commit in (None, self.good_commit):
            return ""
        command = self.commands.bisect("GOOD" if self.good_commit is None else self.good_commit[:10])
        first = ["commit or stash your changes first"] if seen.dirty else []
        first += ["GOOD is a commit that passes"] if self.good_commit is None else []
        hint = f" ({'; '.join(first)})" if first else ""
        return f"Find the commit{hint}: {command}" if command else ""

    @property
    def wall(self) -> str:
        """Return the median wall time of a step or a query."""
        return self._shown("step_s", "query_s")

    @property
    def busy(self) -> str:
        """Return the GPU-busy time of a step, or of a decoded token."""
        found = next((name for name in BUSY if name in self._metrics), None)
        return self._shown(*BUSY, suffix="/tok" if found == "busy_decode_token_s" else "")

    @property
    def peak(self) -> str:
        """Return the peak memory of tensors (CPU) or of the allocator (GPU)."""
        return self._shown("peak_bytes")

    @property
    def tokens_per_s(self) -> str:
        """Return unpadded tokens per second, rounded to a whole number."""
        metric = self._metrics.get("tokens_per_s")
        return NOTHING if metric is None else f"{metric.value:,.0f}"

    @property
    def perplexity(self) -> str:
        """Return the perplexity, with that of the unquantized weights in brackets if both were measured."""
        found, plain = self._metrics.get("perplexity"), self._metrics.get("perplexity_unquantized")
        if found is None:
            return NOTHING
        return f"{found.value:.2f}" if plain is None else f"{found.value:.2f} ({plain.value:.2f})"

    @property
    def share(self) -> str:
        """Return the share of its ceiling, "MFU 41 %" or "MBU 55 %"; without a ceiling, what limits it."""
        for name, word in _SHARES:
            if name in self._metrics:
                return f"{word} {100 * self._metrics[name].value:.0f} %"
        busy_share = self._metrics.get("busy_share")
        if busy_share is None:
            return NOTHING
        return (busy_share.note or "").rpartition("; ")[2].partition(":")[0] or f"busy {100 * busy_share.value:.0f} %"

    @property
    def change(self) -> str:
        """Return the decisive difference from the baseline."""
        if self._is_accepted and self.acceptance is not None:
            return first_change(self.acceptance.changes)
        judgement = self.judgement
        if judgement is None or judgement.broken or judgement.verdict is Verdict.NO_BASELINE:
            return NOTHING
        leading = next((row for row in judgement.metrics if row.verdict is judgement.verdict and row.change), None)
        if judgement.verdict is Verdict.PASS:
            leading = _best_known(judgement)
            return "=" if leading is None or not leading.change else _difference(leading)
        return NOTHING if leading is None else _difference(leading)

    @property
    def _is_accepted(self) -> bool:
        """Return whether the acceptance is the whole result; an accepted case may still exceed a limit of its owner."""
        return self.acceptance is not None and (self.judgement is None or self.judgement.verdict is Verdict.PASS)

    @property
    def _metrics(self) -> dict[str, Metric]:
        return self.record.metrics if self.record.status == "ok" else {}

    def _shown(self, *names: str, suffix: str = "") -> str:
        """Return the value of the first of these metrics that the record holds, marked if it is not judged."""
        name = next((name for name in names if name in self._metrics), None)
        if name is None:
            return NOTHING
        metric = self._metrics[name]
        return f"{units.quantity(metric.value, metric.unit)}{suffix}{'' if self._is_judged(name) else ONLY_SHOWN}"

    def _is_judged(self, name: str) -> bool:
        """Return whether a metric is judged; also where no metric of the case is, since the verdict says that."""
        judgement = self.judgement
        if judgement is None or judgement.broken or not any(_is_compared(each) for each in judgement.metrics):
            return True
        return any(each.metric == name and _is_compared(each) for each in judgement.metrics)


def _is_compared(row: MetricVerdict) -> bool:
    return row.judged and row.limit != "none"


def judged_line(rows: Sequence[Row]) -> str | None:
    """Return what of a table is judged, to stand above it; None where nothing is."""
    judged = [row.judgement for row in rows if row.judgement is not None]
    names = {each.metric for one in judged for each in one.metrics if _is_compared(each)}
    if not names:
        return None
    shown = {"wall": WALL, "busy": BUSY, "peak memory": ("peak_bytes",)}
    columns = [column for column, metrics in shown.items() if names.intersection(metrics)]
    more = len(names.difference(*shown.values()))
    counted = [units.counted(more, "other metric")] if more else []
    is_marked = any(text.endswith(ONLY_SHOWN) for row in rows for text in (row.wall, row.busy, row.peak))
    mark = f"; {ONLY_SHOWN} not judged" if is_marked else ""
    return f"judged: {', '.join([*columns, *counted])}{mark}"


def _best_known(judgement: Judgement) -> MetricVerdict | None:
    by_name = {row.metric: row for row in judgement.metrics}
    return next((by_name[name] for name in _LEADING if name in by_name), None)


def _difference(row: MetricVerdict) -> str:
    if row.change is None:
        return NOTHING
    if row.ratio is not None and abs(row.ratio) < 10:
        return f"{row.metric} {units.percent(row.ratio)}"
    return f"{row.metric} {units.change(row.change, row.unit)}"


def first_change(changes: tuple[Change, ...]) -> str:
    """Return the change that a reader compares first; "=" if there is none."""
    if not changes:
        return "="
    by_name = {change.metric: change for change in changes}
    leading = next((by_name[name] for name in _LEADING if name in by_name), changes[0])
    return moved(leading)


def moved(change: Change) -> str:
    """Return such as "peak_bytes 5.40 MiB → 5.60 MiB"."""
    if change.old is not None and change.new is not None:
        return f"{change.metric} {units.pair(change.old, change.new, change.unit)}"
    value = change.new if change.new is not None else change.old
    assert value is not None
    word = "dropped " if change.new is None else ""
    return f"{word}{change.metric} {units.quantity(value, change.unit)}"


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """The range of a value over processes and sessions. No confidence interval: there are too few."""

    low: float
    high: float
    count: int
    """How many values, at least two."""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One case on one machine."""

    record: Record
    """The newest record."""
    past: tuple[Record, ...]
    """All sound records of the same case (by digest) on this machine, oldest first, the newest included."""
    judgement: Judgement | None = None
    """None if no baselines were named."""
    grown: tuple[str, ...] = ()
    """What holds more memory at the peak than in the last accepted record, largest growth first."""
    cause: Cause | None = None
    """Why it differs from its baseline; None if it does not, if the run failed, or if no baseline is sound."""

    @property
    def row(self) -> Row:
        """Return the same as a row of the terminal's table."""
        return Row(record=self.record, judgement=self.judgement, grown=self.grown, cause=self.cause)

    @property
    def case(self) -> str:
        """Return the case's id."""
        return self.record.case.id

    @property
    def anchor(self) -> str:
        """Return the id of the case's details on the page."""
        return f"c-{self.machine}-{self.case.replace('/', '--')}"

    @property
    def machine(self) -> str:
        """Return the machine's key, "predicted" if nothing ran."""
        return self.record.circumstances.machine.key

    @property
    def is_predicted(self) -> bool:
        """Return whether the numbers were predicted on fake tensors."""
        return self.machine == "predicted" or "predicted" in self.record.circumstances.gpu

    @property
    def metrics(self) -> dict[str, Metric]:
        """Return the metrics of a sound record; none of a failed or invalid one."""
        return self.record.metrics if self.record.status == "ok" else {}

    @property
    def needs_attention(self) -> bool:
        """Return whether a reader should look at it: anything but PASS, or a record that is not sound."""
        if self.record.status != "ok":
            return True
        return self.judgement is not None and self.judgement.verdict is not Verdict.PASS

    def value(self, *names: str) -> float | None:
        """Return the value of the first of these metrics that the record holds."""
        name = self.name_of(*names)
        return None if name is None else float(self.metrics[name].value)

    def name_of(self, *names: str) -> str | None:
        """Return the first of these names that is a metric of the record."""
        return next((name for name in names if name in self.metrics), None)

    def spread(self, *names: str) -> Spread | None:
        """Return the range of the first of these metrics; None for a single value.

        Rounds within one process are not replicates: each session contributes the median of its wall times.
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
    """Return one entry for each machine and case, sorted by both (numbers in an id by size), and judged if `baselines` is given."""
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
    """Return a key that sorts -b4 before -b16. Digits are compared by their count first, so an id of a thousand digits is never converted."""
    parts = re.split(r"([0-9]+)", name)
    return [(len(part.lstrip("0")) if at % 2 else 0, part) for at, part in enumerate(parts)]


class _Judged(NamedTuple):
    judgement: Judgement | None = None
    grown: tuple[str, ...] = ()
    cause: Cause | None = None


def _judged(baselines: Path, alpha: float, record: Record) -> _Judged:
    """Return the verdict as the suite gives it, without waivers; what grew since the last accepted record; and the cause."""
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


def grown(before: Record, now: Record, most: int = 5) -> tuple[str, ...]:
    """Return lines such as "activations aten.mul.Tensor 1.31 GiB → 3.00 GiB (+1.69 GiB)", largest first."""
    old, new = before.makers_at_peak, now.makers_at_peak
    if not old:
        return ()
    changes = {name: value - old.get(name, 0) for name, value in new.items()}
    largest = sorted(changes.items(), key=lambda each: (-each[1], each[0]))[:most]
    return tuple(
        f"{name} {units.quantity(old.get(name, 0), 'bytes')} → {units.quantity(new[name], 'bytes')} ({units.change(change, 'bytes')})"
        for name, change in largest
        if change >= _WORTH_SAYING_BYTES
    )
