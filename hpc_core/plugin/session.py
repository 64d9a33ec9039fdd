"""What a test gets as `perf_session`: the records of this session so far, jobs that are not judged, and text at its end.

For tests that judge several records together, or the suite itself.
"""

from __future__ import annotations

from collections.abc import Mapping

from hpc_core.plugin.runner import Runner
from hpc_core.record.job import Job
from hpc_core.record.record import Record

__all__ = ["PerfSession"]


class PerfSession:
    """The fixture `perf_session`."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.shown: list[tuple[str, str]] = []
        """Sections for the end of the run, as (title, text)."""

    @property
    def records(self) -> Mapping[str, Record]:
        """What ran in this session and is sound, by case id."""
        return {row.case: row.record for row in self._runner.rows if row.record.status == "ok"}

    def run(self, job: Job) -> Record:
        """The record of a job in a process of its own, neither judged nor listed.

        Raises:
            LaunchError: no worker can be started at all.
        """
        return self._runner.run_unjudged(job)

    def show(self, title: str, text: str) -> None:
        """Print a section below the table that ends the run."""
        self.shown.append((title, text))
