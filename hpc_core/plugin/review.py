"""Judge records for a review: against the baselines of the working tree or of the merge base, with waivers applied."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

from hpc_core.baselines.at_commit import PastBaselines, baseline_changes
from hpc_core.baselines.baseline import Baseline, Damaged, Lookup
from hpc_core.baselines.history import Session, sessions
from hpc_core.baselines.lookup import find
from hpc_core.case.errors import BaselineError, RepositoryError
from hpc_core.gate.busy import sessions_of_regime
from hpc_core.gate.intervals import EARLY_PASS_ALPHA, PASS_ALPHA
from hpc_core.gate.judge import judge
from hpc_core.gate.pull_request import Side, judge_pull_request
from hpc_core.gate.verdict import Judgement, Verdict
from hpc_core.gate.waivers import expired, waived
from hpc_core.plugin.options import Settings
from hpc_core.record.git import merge_base
from hpc_core.record.record import Record
from hpc_core.record.repeats import busy_values
from hpc_core.report.entry import Row
from hpc_core.report.lines import change_line, waiver_line


class Review:
    """Judge records, and report which baselines changed and what is waived."""

    def __init__(self, settings: Settings, today: datetime.date | None = None) -> None:
        """Read the baselines of the merge base, if `--perf-base` is given.

        Raises:
            pytest.UsageError: git knows no such merge base.
        """
        self._settings = settings
        self._today = today or datetime.datetime.now(datetime.UTC).date()
        self._base = _at_merge_base(settings.baselines, settings.base)
        self.known: tuple[str, ...] | None = None
        """Ids of all cases of the suite; None if only part of it was collected."""

    def judged(self, record: Record, alpha: float, *, pass_alpha: float = PASS_ALPHA) -> Judgement:
        """Judge a record, and apply its waivers; `alpha` is its share of the suite's false alarms."""
        key, case_id = record.circumstances.machine.key, record.case.id
        here = find(self._settings.baselines, key, case_id)
        accepted_sessions = partial(sessions, self._settings.baselines, key, case_id, digest=record.case.digest)
        judgement = _against(record, here, accepted_sessions, alpha, pass_alpha)
        if self._base is not None:
            there = self._base.find(key, case_id)
            past = partial(self._base.sessions, key, case_id, digest=record.case.digest)
            before = _against(record, there, past, alpha, pass_alpha)
            judgement = judge_pull_request(Side(there, before), Side(here, judgement))
        return waived(judgement, record, self._settings.waivers, self._today)

    def passes_early(self, record: Record, alpha: float) -> bool:
        """Return whether one process decides: every busy metric passes, so that further processes would change no verdict."""
        rows = self.judged(record, alpha, pass_alpha=EARLY_PASS_ALPHA).metrics
        busy = [row for row in rows if row.metric in busy_values(record)]
        return bool(busy) and all(row.verdict is Verdict.PASS for row in busy)

    def good_commit(self, record: Record) -> str | None:
        """Return the commit that the record's baseline was measured at; None if it is unknown or had uncommitted changes."""
        key, case_id = record.circumstances.machine.key, record.case.id
        lookup = find(self._settings.baselines, key, case_id) if self._base is None else self._base.find(key, case_id)
        return lookup.accepted.commit if isinstance(lookup, Baseline) and not lookup.accepted.dirty else None

    def expired(self, case_id: str | None = None) -> tuple[str, ...]:
        """Return a sentence for each expired waiver: of one case, or of all."""
        return expired(self._settings.waivers, self._today, case_id)

    def sections(self, rows: Sequence[Row]) -> list[tuple[str, str]]:
        """Return titles and texts for the end of a run: the baselines that changed, and the waivers."""
        found = []
        if self._base is not None:
            title = f"baselines changed since the merge base with {self._settings.base} ({self._base.commit[:10]})"
            lines = [change_line(change) for change in baseline_changes(self._settings.baselines, self._base)]
            found.append((title, "\n".join(lines or ["none"])))
        if self._settings.waivers:
            lines = [waiver_line(waiver, rows, self.known, self._today) for waiver in self._settings.waivers]
            found.append(("waivers", "\n".join(lines)))
        return found


def _against(
    record: Record,
    lookup: Lookup,
    accepted_sessions: Callable[[], tuple[Session, ...]],
    alpha: float,
    pass_alpha: float,
) -> Judgement:
    """Judge by a baseline and the sessions that were accepted for it. A damaged history counts as a damaged baseline."""
    if not isinstance(lookup, Baseline):
        return judge(record, lookup, alpha=alpha, pass_alpha=pass_alpha)
    try:
        found = sessions_of_regime([session.metrics for session in accepted_sessions()], lookup.metrics)
    except BaselineError as error:
        return judge(record, Damaged(path=f"the history of {record.case.id}", reason=str(error)), alpha=alpha)
    return judge(record, lookup, sessions=found, alpha=alpha, pass_alpha=pass_alpha)


def _at_merge_base(baselines: Path, revision: str | None) -> PastBaselines | None:
    if revision is None:
        return None
    folder = next(each for each in (baselines, *baselines.parents) if each.is_dir())
    try:
        return PastBaselines(baselines, merge_base(folder, revision))
    except RepositoryError as error:
        raise pytest.UsageError(f"--perf-base {revision}: {error}") from error
