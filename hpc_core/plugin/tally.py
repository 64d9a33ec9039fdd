"""Which cases of a run were measured, which were not, and why. Under strict the exit code comes from here, not from pytest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from hpc_core.plugin import uses_perf
from hpc_core.plugin.cases import case_id_of
from hpc_core.plugin.fixture import CALLED, OUTCOME
from hpc_core.plugin.outcome import FailureKind
from hpc_core.plugin.review import WithoutTest
from hpc_core.record import units
from hpc_core.report.entry import Row

_MOST_REASONS = 3


class Tally:
    """Count what became of each case that was chosen.

    Args:
        paths: the folders and files of the suite. A file of theirs that skips itself holds cases that were not measured.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = [path.resolve() for path in paths]
        self._cases: dict[str, pytest.Item] = {}
        self._deselected: set[str] = set()
        self._why_not: dict[str, str] = {}
        """Why tests of cases were skipped, and files were."""
        self._failed: set[str] = set()
        self._files: list[str] = []
        self.on_request = 0
        """Cases that nobody asked for."""
        self.silenced: tuple[str, ...] = ()
        """What settings leave out of the suite, a text each."""
        self.without_test = WithoutTest()
        """Accepted cases that no test of the suite has; known when the session ends."""

    def choose(self, items: Iterable[pytest.Item]) -> None:
        """Expect these tests to measure, if they are cases."""
        self._cases = {item.nodeid: item for item in items if uses_perf(item, "perf")}

    def deselect(self, items: Iterable[pytest.Item]) -> None:
        """Expect these tests no more: somebody deselected them, and pytest reports it."""
        self._deselected |= {item.nodeid for item in items}

    @property
    def deselected(self) -> frozenset[str]:
        """Ids of the cases that somebody deselected."""
        return frozenset(case_id_of(item) for nodeid, item in self._cases.items() if nodeid in self._deselected)

    def collected(self, items: Iterable[pytest.Item]) -> None:
        """Note which cases somebody removed without deselecting them."""
        left = {item.nodeid for item in items}
        for nodeid in self._expected().keys() - left:
            self._why_not[nodeid] = "removed by a plugin or a conftest.py"

    def note_file(self, path: Path, report: pytest.CollectReport) -> None:
        """Note a file of the suite that skips itself."""
        if report.skipped and any(path.is_relative_to(each) for each in self._paths):
            self._files.append(report.nodeid)
            self._why_not[report.nodeid] = _reason(report)

    def note(self, report: pytest.TestReport) -> None:
        """Note how a test went."""
        if report.failed:
            self._failed.add(report.nodeid)
        elif report.skipped:
            self._why_not[report.nodeid] = _reason(report)

    def _expected(self) -> dict[str, pytest.Item]:
        return {nodeid: item for nodeid, item in self._cases.items() if nodeid not in self._deselected}

    def kinds(self, measured: int = 0) -> list[FailureKind]:
        """Return why each case that is not all right fails the run: its own outcome, or nothing to compare.

        A run that measured nothing fails too; `measured` counts what ran without being a case.
        """
        found: list[FailureKind] = ["not comparable" for _ in (*self._files, *self.without_test.missed)]
        for nodeid, item in self._expected().items():
            outcome = item.stash.get(OUTCOME, None)
            measured += outcome is not None
            if outcome is not None and outcome.result != "passed":
                found.append(outcome.kind)
            elif (outcome is None or nodeid in self._why_not) and nodeid not in self._failed:
                found.append("not comparable")
        return found if measured else [*found, "not comparable"]

    def line(self, rows: Sequence[Row]) -> str:
        """Return one line: what was measured, with what verdicts, what was not, and why."""
        predicted = [row for row in rows if row.record.circumstances.machine.key == "predicted"]
        measured = [row for row in rows if row not in predicted]
        parts = [_counted(measured, "measured") if measured or not predicted else ""]
        parts += [_counted(predicted, "predicted") if predicted else ""]
        missing = [nodeid for nodeid, item in self._expected().items() if OUTCOME not in item.stash]
        if missing or self._files:
            reasons = Counter(map(self._why, [*missing, *self._files]))
            shown = [f"{many} {reason}" for reason, many in reasons.most_common(_MOST_REASONS)]
            rest = sum(reasons.values()) - sum(many for _, many in reasons.most_common(_MOST_REASONS))
            parts.append(f"not measured: {', '.join([*shown, *([f'{rest} for other reasons'] if rest else [])])}")
        missed, elsewhere = self.without_test.missed, self.without_test.elsewhere
        if missed:
            more = f" and {len(missed) - _MOST_REASONS} more" if len(missed) > _MOST_REASONS else ""
            named = f"{', '.join(missed[:_MOST_REASONS])}{more}"
            parts.append(f"accepted, and no test judges it: {named} (restore the test, or delete the baseline)")
        parts.append(f"{units.counted(elsewhere, 'other accepted case')} not in this suite" if elsewhere else "")
        dropped = len(self._cases) - len(self._expected())
        parts.append(f"{dropped} deselected" if dropped else "")
        parts.append(f"{self.on_request} more on request" if self.on_request else "")
        parts += self.silenced
        return "hpc-core: " + "; ".join(filter(None, parts))

    def _why(self, nodeid: str) -> str:
        if nodeid in self._failed:
            return "(its test failed first)"
        known = self._why_not.get(nodeid)
        if known is None:
            item = self._cases.get(nodeid)
            known = "its test did not call perf" if item is not None and CALLED in item.stash else "did not run"
        return f"({known})"


def _reason(report: pytest.CollectReport | pytest.TestReport) -> str:
    """Return why pytest skipped it."""
    expected = getattr(report, "wasxfail", None)
    if expected is not None:
        return f"xfail: {expected.removeprefix('reason: ')}" if expected else "xfail"
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


def _counted(rows: Sequence[Row], how: str) -> str:
    if not rows:
        return f"no case {how}"
    verdicts = Counter(row.verdict for row in rows)
    shown = ", ".join(f"{many} {verdict}" for verdict, many in verdicts.items())
    return f"{units.counted(len(rows), 'case')} {how} ({shown})"
