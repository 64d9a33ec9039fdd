"""Judge records for a review: against the baselines of the working tree or of the merge base, with waivers applied."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable, Container, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import msgspec

from hpc_core.baselines.at_commit import BaselineChange, baseline_changes, known_on_disk
from hpc_core.baselines.baseline import Baseline, Damaged, Lookup, gated_metrics
from hpc_core.baselines.history import Session, sessions
from hpc_core.baselines.lookup import find
from hpc_core.baselines.pull_request import Loosening, PullRequest
from hpc_core.case.errors import BaselineError, RepositoryError
from hpc_core.case.limits import Limits
from hpc_core.gate.busy import sessions_of_regime
from hpc_core.gate.intervals import EARLY_PASS_ALPHA, PASS_ALPHA
from hpc_core.gate.judge import judge
from hpc_core.gate.loosened import loosened_baseline, loosened_limits, loosened_waivers
from hpc_core.gate.pull_request import Side, judge_pull_request, limits_beside
from hpc_core.gate.verdict import Judgement, Verdict
from hpc_core.gate.waivers import expired, waived, waived_since_base
from hpc_core.plugin.base import MergeBase
from hpc_core.plugin.options import Settings
from hpc_core.record.git import files, git
from hpc_core.record.record import Record
from hpc_core.record.repeats import busy_values, disturbed
from hpc_core.report.entry import Row
from hpc_core.report.lines import change_line, waiver_line


class WithoutTest(msgspec.Struct, frozen=True):
    """Accepted cases that no test judges."""

    missed: tuple[str, ...] = ()
    """Those that a test of the suite must have judged."""
    elsewhere: int = 0
    """How many others there are."""


class Review:
    """Judge records, and report which baselines changed and what is waived."""

    def __init__(self, settings: Settings, today: datetime.date | None = None) -> None:
        """Read the baselines of the merge base, if `--perf-base` is given.

        Raises:
            pytest.UsageError: git knows no such merge base.
        """
        self._settings = settings
        self._today = today or datetime.datetime.now(datetime.UTC).date()
        self._base = None if settings.base is None else MergeBase(settings.base, settings.rules)
        self._loosened: dict[str, Loosening] = {}
        self.known: dict[str, Path] | None = None
        """All cases of the suite, by id, and their files; None if only part of it was collected."""
        self.of_other_scale: frozenset[str] = frozenset()
        """Those of them that this run leaves out because of their scale."""

    def judged(self, record: Record, alpha: float, *, pass_alpha: float = PASS_ALPHA) -> Judgement:
        """Judge a record, and apply its waivers; `alpha` is its share of the suite's false alarms."""
        key, case_id = record.circumstances.machine.key, record.case.id
        here = find(self._settings.baselines, key, case_id)
        accepted_sessions = partial(sessions, self._settings.baselines, key, case_id, digest=record.case.digest)
        alphas = alpha, pass_alpha
        if self._base is None:
            return waived(
                _against(record, here, accepted_sessions, alphas), record, self._settings.waivers, self._today
            )
        there = self._base.baselines.find(key, case_id)
        past = partial(self._base.baselines.sessions, key, case_id, digest=record.case.digest)
        at_base, at_head = limits_beside(there, here)
        judgement = judge_pull_request(
            Side(there, _against(record, there, past, alphas, at_base)),
            Side(here, _against(record, here, accepted_sessions, alphas, at_head)),
        )
        judgement = waived_since_base(judgement, record, self._settings.waivers, self._base.waivers, self._today)
        return judgement if not isinstance(there, Baseline) else self._with_limits(judgement, record, there, here)

    def _with_limits(self, judgement: Judgement, record: Record, base: Baseline, head: Lookup) -> Judgement:
        """Note the limits that the code loosens, and remark those that no acceptance brings."""
        found = loosened_limits(record.case.id, base.spec.limits, record.case.limits, base.metrics)
        self._loosened |= {each.line: each for each in found}
        if not found or (isinstance(head, Baseline) and head.spec.limits == record.case.limits):
            return judgement
        lines = "; ".join(each.line for each in found)
        why = f"looser than at the merge base, and without effect until the case is accepted with it: {lines}"
        return msgspec.structs.replace(judgement, remarks=(*judgement.remarks, why))

    def passes_early(self, record: Record, alpha: float) -> bool:
        """Return whether one process decides: every judged time passes, so that further processes would change no verdict.

        On a GPU, a case without a baseline gets further processes too: they take an hour to rent again when it is accepted.
        """
        if disturbed(record.metrics):
            return False
        rows = self.judged(record, alpha, pass_alpha=EARLY_PASS_ALPHA).metrics
        times = {name for name, metric in gated_metrics(record).items() if metric.noise != "exact"}
        judged = [row for row in rows if row.judged and row.metric in times]
        if not busy_values(record):
            return all(row.verdict in (Verdict.PASS, Verdict.NO_BASELINE, Verdict.INCOMPATIBLE) for row in judged)
        return bool(judged) and all(row.verdict is Verdict.PASS for row in judged)

    def good_commit(self, record: Record) -> str | None:
        """Return the commit before HEAD that the record's baseline was measured at; None if git knows none or it had uncommitted changes."""
        key, case_id = record.circumstances.machine.key, record.case.id
        lookup = (
            find(self._settings.baselines, key, case_id)
            if self._base is None
            else self._base.baselines.find(key, case_id)
        )
        commit = lookup.accepted.commit if isinstance(lookup, Baseline) and not lookup.accepted.dirty else None
        try:
            if commit is not None:
                git(Path.cwd(), "merge-base", "--is-ancestor", commit, "HEAD")
        except RepositoryError:  # squashed, rebased, of another repository, or not fetched
            return None
        return commit

    def expired(self, case_id: str | None = None) -> tuple[str, ...]:
        """Return a sentence for each expired waiver: of one case, or of all."""
        return expired(self._settings.waivers, self._today, case_id)

    @functools.cached_property
    def _changes(self) -> tuple[BaselineChange, ...]:
        return () if self._base is None else baseline_changes(self._settings.baselines, self._base.baselines)

    def _all_loosened(self, rows: Sequence[Row]) -> tuple[Loosening, ...]:
        """Return what this pull request loosens: settings, waivers, limits, and cases that are no longer judged."""
        assert self._base is not None
        found = [*self._base.settings_changed(), *loosened_waivers(self._base.waivers, self._settings.waivers)]
        found += self._no_longer_judged(rows)
        for change in self._changes:
            if not isinstance(change.old, Baseline):
                continue
            found += loosened_baseline(change.machine, change.case, change.old, change.new)
            if isinstance(change.new, Baseline):
                limits = change.old.spec.limits, change.new.spec.limits
                found += loosened_limits(change.case, *limits, change.old.metrics)
        return tuple({each.line: each for each in [*found, *self._loosened.values()]}.values())

    def _no_longer_judged(self, rows: Sequence[Row]) -> list[Loosening]:
        """Return the cases with a baseline at the merge base that run without a judgement, or do not run."""
        assert self._base is not None
        places = {(row.record.circumstances.machine.key, row.case): row for row in rows}
        machines = {machine for machine, _ in places}
        found = []
        for machine, case_id in self._base.baselines.known():
            row = places.get((machine, case_id))
            new = ""
            if row is not None:
                new = "runs with judge=False" if row.judgement is None and row.record.status == "ok" else ""
            elif self.known is not None and machine in machines:
                new = "no test runs it" if case_id not in self.known else self._why_not_measured(machine, case_id)
            if new:
                found.append(Loosening(what=f"case {case_id} on {machine}", old="judged", new=new))
        return found

    def _why_not_measured(self, machine: str, case_id: str) -> str:
        """Return why a case of the suite that did not run may be one that ran at the merge base; nothing if it cannot.

        Its own file or a conftest.py changed: a mark there makes it wait for a request, or skips it.
        """
        assert self._base is not None
        assert self.known is not None
        lookup = self._base.baselines.find(machine, case_id)
        is_of_this_scale = isinstance(lookup, Baseline) and self._settings.scale in (None, lookup.spec.scale)
        if self._settings.globs or not is_of_this_scale or machine == "predicted":
            return ""
        changed = self._base.changed(self.known[case_id])
        return f"not measured, and {changed} changed" if changed else ""

    def without_test(self, rows: Sequence[Row], deselected: Container[str]) -> WithoutTest:
        """Return the accepted cases of a machine that this run measured on, which nothing judges; none unless it is the whole suite.

        One is missed if its test says judge=False, is now of another scale, is deselected by settings or a conftest.py, or is gone. The last holds for a step of one's own
        if no other folder has its file. Any other case may be that of a file that runs only when it is named.
        """
        if self.known is None:
            return WithoutTest()
        machines = {row.record.circumstances.machine.key for row in rows} - {"predicted"}
        run = {row.case: row for row in rows}
        missed, elsewhere = [], 0
        for machine, case_id in known_on_disk(self._settings.baselines):
            if machine not in machines:
                continue
            row = run.get(case_id)
            if row is not None:
                is_missed = row.judgement is None and row.record.status == "ok"
            elif case_id in self.known:
                moved = case_id in self.of_other_scale and self._was_of_this_scale(machine, case_id)
                is_missed = moved or case_id in deselected
            else:
                is_missed = self._was_of_this_suite(case_id)
                elsewhere += not is_missed
            missed += [case_id] if is_missed else []
        return WithoutTest(missed=tuple(dict.fromkeys(missed)), elsewhere=elsewhere)

    def _was_of_this_scale(self, machine: str, case_id: str) -> bool:
        found = find(self._settings.baselines, machine, case_id)
        return isinstance(found, Baseline) and found.spec.scale == self._settings.scale

    def _was_of_this_suite(self, case_id: str) -> bool:
        """Return whether an id is that of a step of one's own in a test file, and no file outside the suite can have given it."""
        name = f"{case_id.partition('/')[0].rpartition('.')[2]}.py"
        if not any(fnmatchcase(name, pattern) for pattern in ("test_*.py", "*_test.py")):
            return False
        suites = [Path(path.partition("::")[0]).resolve() for path in self._settings.paths]
        try:
            alike = [path.resolve() for path in files(self._settings.rules.root) if path.name.lower() == name]
        except RepositoryError:
            return True
        return all(any(path.is_relative_to(suite) for suite in suites) for path in alike)

    def pull_request(self, rows: Sequence[Row]) -> PullRequest | None:
        """Return what the pull request loosens, for reports; None without `--perf-base`."""
        if self._base is None:
            return None
        loosened = self._all_loosened(rows)
        return PullRequest(revision=self._base.revision, merge_base=self._base.commit, loosened=loosened)

    def sections(self, rows: Sequence[Row]) -> list[tuple[str, str]]:
        """Return titles and texts for the end of a run: the baselines that changed, and the waivers."""
        found = []
        if self._base is not None:
            since = f"since the merge base with {self._base.revision} ({self._base.commit[:10]})"
            lines = [change_line(change) for change in self._changes]
            found.append((f"baselines changed {since}", "\n".join(lines or ["none"])))
            lines = [each.line for each in self._all_loosened(rows)]
            found.append((f"loosened {since}", "\n".join(lines or ["nothing"])))
        lines = self._waiver_lines(rows)
        return [*found, ("waivers", "\n".join(lines))] if lines else found

    def _waiver_lines(self, rows: Sequence[Row]) -> list[str]:
        """Return a line for each waiver of a case that ran, and for each that needs attention: expired, not merged, or of no case."""
        known: set[str] | None = None
        if self.known is not None and not self._settings.globs:
            # A case that only another file or machine runs has a baseline.
            known = {*self.known, *(case_id for _, case_id in known_on_disk(self._settings.baselines))}
        base = self._settings.waivers if self._base is None else self._base.waivers
        lines = []
        for waiver in self._settings.waivers:
            is_merged = not loosened_waivers(base, [waiver])
            runs = any(waiver.covers(row.case) for row in rows)
            is_of_no_case = known is not None and not any(map(waiver.covers, known))
            if runs or waiver.is_over(self._today) or not is_merged or is_of_no_case:
                lines.append(waiver_line(waiver, rows, known, self._today, is_merged=is_merged))
        return lines


def _against(
    record: Record,
    lookup: Lookup,
    accepted_sessions: Callable[[], tuple[Session, ...]],
    alphas: tuple[float, float],
    beside: Sequence[Limits] = (),
) -> Judgement:
    """Judge by a baseline and the sessions that were accepted for it. A damaged history counts as a damaged baseline."""
    judged = partial(judge, record, beside=beside, alpha=alphas[0], pass_alpha=alphas[1])
    if not isinstance(lookup, Baseline):
        return judged(lookup)
    try:
        found = sessions_of_regime([session.metrics for session in accepted_sessions()], lookup.metrics)
    except BaselineError as error:
        return judged(Damaged(path=f"the history of {record.case.id}", reason=str(error)))
    return judged(lookup, sessions=found)
