"""One case in a report: its record, what the gate said, what became of its baseline; and the cells that show it.

Knows which metrics a reader compares first. Knows no terminal.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from hpc_core.baselines.baseline import Acceptance, Change
from hpc_core.explain.explain import Cause
from hpc_core.gate.verdict import Judgement, MetricVerdict, Verdict
from hpc_core.record import units as sizes
from hpc_core.record.record import Metric, Record

__all__ = ["Row", "accepted_line"]

_NOTHING = "-"
_BUSY = ("busy_s", "busy_decode_token_s")
_SHARES = (("mfu", "MFU"), ("mbu", "MBU"))
_LEADING = ("peak_bytes", "busy_s", "busy_decode_token_s", "step_s", "query_s")
"""Whose change is shown where no metric is worse than allowed."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one case at the end of a run."""

    record: Record
    judgement: Judgement | None = None
    """None where nothing was judged, as with `hpc-core run`."""
    acceptance: Acceptance | None = None
    """Set where the record became the baseline."""
    refused: str | None = None
    """Why it was to become the baseline and did not."""
    grown: tuple[str, ...] = ()
    """What holds more memory at the peak than in the last accepted record, the largest first."""
    cause: Cause | None = None
    """Why it is not as its baseline, where it is not."""
    expired: tuple[str, ...] = ()
    """Waivers of this case whose day has passed, a sentence each."""
    command: str | None = None
    """Runs just this case again, where that takes more than its id."""
    good_commit: str | None = None
    """The commit whose numbers the baseline holds, where it is known."""

    @property
    def case(self) -> str:
        """The case's id."""
        return self.record.case.id

    @property
    def verdict(self) -> str:
        """The word in the table: the gate's verdict, or what became of the run."""
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
    def wall(self) -> str:
        """Median seconds of a step or a query, as a clock on the host saw them."""
        return self._shown("step_s", "query_s")

    @property
    def busy(self) -> str:
        """GPU-busy seconds of a step, or of a decoded token."""
        found = next((name for name in _BUSY if name in self._metrics), None)
        text = self._shown(*_BUSY)
        return f"{text}/tok" if found == "busy_decode_token_s" else text

    @property
    def peak(self) -> str:
        """Peak memory of tensors (CPU) or of the allocator (GPU)."""
        return self._shown("peak_bytes")

    @property
    def tokens_per_s(self) -> str:
        """Unpadded tokens a second, to the nearest whole one."""
        metric = self._metrics.get("tokens_per_s")
        return _NOTHING if metric is None else f"{metric.value:,.0f}"

    @property
    def perplexity(self) -> str:
        """Of the model as it ran, and in brackets that of the same weights unquantized where both were measured."""
        found, plain = self._metrics.get("perplexity"), self._metrics.get("perplexity_unquantized")
        if found is None:
            return _NOTHING
        return f"{found.value:.2f}" if plain is None else f"{found.value:.2f} ({plain.value:.2f})"

    @property
    def share(self) -> str:
        """Share of the ceiling it runs against: "MFU 41 %" or "MBU 55 %"; without a ceiling, what it is bound by."""
        for name, word in _SHARES:
            if name in self._metrics:
                return f"{word} {100 * self._metrics[name].value:.0f} %"
        busy_share = self._metrics.get("busy_share")
        if busy_share is None:
            return _NOTHING
        return (busy_share.note or "").rpartition("; ")[2].partition(":")[0] or f"busy {100 * busy_share.value:.0f} %"

    @property
    def change(self) -> str:
        """The decisive difference from the baseline."""
        if self._is_accepted and self.acceptance is not None:
            return _first_change(self.acceptance.changes)
        judgement = self.judgement
        if judgement is None or judgement.broken or judgement.verdict is Verdict.NO_BASELINE:
            return _NOTHING
        leading = next((row for row in judgement.metrics if row.verdict is judgement.verdict and row.change), None)
        if judgement.verdict is Verdict.PASS:
            leading = _best_known(judgement)
            return "=" if leading is None or not leading.change else _difference(leading)
        return _NOTHING if leading is None else _difference(leading)

    @property
    def _is_accepted(self) -> bool:
        """Whether an acceptance is all there is to say: the case may still break a limit that its owner has set."""
        return self.acceptance is not None and (self.judgement is None or self.judgement.verdict is Verdict.PASS)

    @property
    def _metrics(self) -> dict[str, Metric]:
        return self.record.metrics if self.record.status == "ok" else {}

    def _shown(self, *names: str) -> str:
        metric = next((self._metrics[name] for name in names if name in self._metrics), None)
        return _NOTHING if metric is None else sizes.quantity(metric.value, metric.unit)


def _best_known(judgement: Judgement) -> MetricVerdict | None:
    by_name = {row.metric: row for row in judgement.metrics}
    return next((by_name[name] for name in _LEADING if name in by_name), None)


def _difference(row: MetricVerdict) -> str:
    if row.change is None:
        return _NOTHING
    if row.ratio is not None and abs(row.ratio) < 10:
        return f"{row.metric} {sizes.percent(row.ratio)}"
    return f"{row.metric} {sizes.change(row.change, row.unit)}"


def _first_change(changes: tuple[Change, ...]) -> str:
    if not changes:
        return "="
    by_name = {change.metric: change for change in changes}
    leading = next((by_name[name] for name in _LEADING if name in by_name), changes[0])
    return _moved(leading)


def _moved(change: Change) -> str:
    if change.old is not None and change.new is not None:
        return f"{change.metric} {sizes.pair(change.old, change.new, change.unit)}"
    value = change.new if change.new is not None else change.old
    assert value is not None
    word = "dropped " if change.new is None else ""
    return f"{word}{change.metric} {sizes.quantity(value, change.unit)}"


def accepted_line(acceptance: Acceptance) -> str:
    """What an acceptance wrote: "updated baselines/cpu/tiny/lora.json: peak_bytes 5.40 MiB → 5.60 MiB (and 3 more)"."""
    path = Path(acceptance.path)
    path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    if acceptance.action == "unchanged":
        return f"unchanged {path}: every gated metric as accepted"
    moved = [change for change in acceptance.changes if change.old is not None]
    if acceptance.action == "created" or not moved:
        leading = _first_change(acceptance.changes)
        return f"{acceptance.action} {path}: {len(acceptance.changes)} metrics, {leading}"
    return f"{acceptance.action} {path}: {'; '.join(_moved(change) for change in acceptance.changes)}"
