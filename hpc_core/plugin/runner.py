"""Run cases one after another, and judge each: launcher, baselines and gate in one place.

Knows no pytest item and no outcome. Nothing starts before the first case does.
"""

from __future__ import annotations

import importlib
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import msgspec

from hpc_core.baselines.accept import accept
from hpc_core.baselines.history import last_accepted
from hpc_core.case.case import Case
from hpc_core.case.errors import BaselineError, RecordError
from hpc_core.case.workloads import CallableSpec
from hpc_core.explain.explain import stored_cause
from hpc_core.gate.verdict import SUITE_ALPHA, Judgement, Verdict
from hpc_core.launch.launcher import Launcher, preloadable
from hpc_core.plugin.options import Settings
from hpc_core.plugin.progress import Progress
from hpc_core.plugin.repeats import DEFAULT, Enough, Plan, narrow, replicated
from hpc_core.plugin.resume import Earlier
from hpc_core.plugin.review import Review
from hpc_core.record.environment import visible_gpus
from hpc_core.record.files import write_record
from hpc_core.record.job import (
    Event,
    Job,
    Kind,
    Measure,
    MeasureCeilings,
    Phase,
    Predict,
    Retime,
)
from hpc_core.record.record import Circumstances, Metric, Record
from hpc_core.record.repeats import merged
from hpc_core.report.command import Command
from hpc_core.report.entry import Row, grown

_NOTE = "measured in the test process: GPU-busy time is reported, not gated"


class Runner:
    """Run and judge the cases of a session with one launcher, and collect their rows.

    `enough` decides whether a case's busy times, one per process, suffice. It is called if there is a time budget.
    """

    def __init__(self, settings: Settings, progress: Progress, review: Review, *, enough: Enough = narrow) -> None:
        self._enough = enough
        self.rows: list[Row] = []
        self.alpha = SUITE_ALPHA
        """The share of the suite's false alarms that each case has."""
        self._settings = settings
        self._review = review
        self._progress = progress
        self._machine: Circumstances | None = None
        """Ceilings and canary of the machine, measured once per session."""
        self._plan = Plan(processes=settings.processes, budget_s=settings.budget_s)
        self._began: float | None = None
        self.earlier: Earlier | None = None
        if settings.resume is not None:
            self.earlier = Earlier(
                settings.resume,
                self._plan,
                ignoring=[settings.baselines, *settings.reports],
                code=settings.code,
                fault=settings.fault,
            )
        self._process = ""
        inline = settings.way == "inline"
        self._launcher = Launcher(settings.way, on_event=lambda _, event: self._on_event(event), debug=inline)
        self._predicting: Launcher | None = None
        """Created for the first prediction; its forkserver differs from that of cases that run."""

    def expect(self, cases: Sequence[Case]) -> None:
        """Preload what the workers of these cases import; called before the first of them runs."""
        self._launcher.preload = preloadable(cases)

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Phase):
            self._progress.phase(f"{self._process}{event.name}")

    def run(self, case: Case, command: Command, *, judge: bool = True) -> Row:
        """Run the case in a process of its own, and judge it; `command` runs only this case.

        Without `judge` no baseline is read or written; a broken or invalid record still fails.

        Raises:
            LaunchError: no worker can be started at all.
            Exception: under `--perf-inline`, any exception of the code under test.
        """
        self._began = time.monotonic() if self._began is None else self._began
        with self._progress.case(case.id):
            first = self._earlier(case) or self._first(case)
            record = self._replicated(case, first) if judge else first
        self._keep(record)
        return self._judged(record, command) if judge else self._unjudged(record, command)

    def _earlier(self, case: Case) -> Record | None:
        return None if self.earlier is None else self.earlier.record(case, _device_of(case))

    def _first(self, case: Case) -> Record:
        """Run the first process, which measures everything."""
        if self._settings.way == "inline":
            load_measuring_half()
        else:
            self._progress.phase("preload")
            self._launcher.prepare()
        device = _device(case)
        today = self._measured_machine(case) if device == "cuda" else None
        ceilings = {} if today is None else today.ceilings
        record = self._launcher.run(Job(case=case, device=device, ceilings=ceilings, fault=self._settings.fault))
        if today is not None and today.canary:
            circumstances = msgspec.structs.replace(record.circumstances, canary=today.canary)
            record = msgspec.structs.replace(record, circumstances=circumstances)
        self._keep(record)
        return record

    def _replicated(self, case: Case, first: Record) -> Record:
        if self._settings.way == "inline":
            return first  # an inline run has one process
        job = Job(case=case, device=_device(case), fault=self._settings.fault, kind=Retime())

        def further(number: int, total: int) -> Record:
            self._process = f"process {number}{f' of {total}' if total else ''}, "
            try:
                return self._launcher.run(job)
            finally:
                self._process = ""

        assert self._began is not None

        def decided(record: Record) -> bool:
            return not self._settings.update and self._review.passes_early(record, self.alpha)

        return replicated(
            first, further, self._plan, enough=self._enough, decided=decided, keep=self._keep, began=self._began
        )

    def predict(self, case: Case, gpu: str, command: Command, *, judge: bool = True) -> Row:
        """Predict the case for this GPU in a process of its own, and judge it against the predictions' baselines.

        Raises:
            LaunchError: no worker can be started at all.
        """
        with self._progress.case(case.id):
            self._progress.phase("preload")
            launcher = self._predicting_launcher()
            launcher.prepare()
            record = launcher.run(Job(case=case, kind=Predict(gpu=gpu), fault=self._settings.fault))
        self._keep(record, predicted_for=gpu)
        return self._judged(record, command) if judge else self._unjudged(record, command)

    def _predicting_launcher(self) -> Launcher:
        if self._predicting is None:
            # Never inline: the fake CUDA device must exist before torch is imported.
            way = "warm" if self._settings.way == "inline" else self._settings.way
            self._predicting = Launcher(way, on_event=lambda _, event: self._on_event(event), predicting=True)
        return self._predicting

    def run_bare(self, case: Case, step: Callable[[], Any], command: Command, *, judge: bool = True) -> Row:
        """Measure a bare callable in this process, and judge it; time it twice more unless the first times decide."""
        with self._progress.case(case.id):
            record = measure_here(case, step, self._on_event)
            if judge and (self._settings.update or not self._review.passes_early(record, self.alpha)):
                again = [measure_here(case, step, self._on_event, Retime()) for _ in range(DEFAULT - 1)]
                record = merged(record, again)
        self._keep(record)
        return self._judged(record, command) if judge else self._unjudged(record, command)

    def run_unjudged(self, job: Job) -> Record:
        """Run a job, and neither judge nor list it: for tests of the suite itself.

        Raises:
            LaunchError: no worker can be started at all.
        """
        with self._progress.case(job.case.id):
            if self._settings.way == "inline":
                load_measuring_half()
            self._launcher.prepare()
            return self._launcher.run(msgspec.structs.replace(job, device=_device(job.case)))

    def _measured_machine(self, case: Case) -> Circumstances:
        """Measure the machine once per session. If that fails, numbers have no ceilings and canary, and the case reports the failure."""
        if self._machine is None:
            job = Job(case=case, device="cuda", kind=MeasureCeilings(canary=True))
            self._machine = self._launcher.run(job).circumstances
        return self._machine

    def _unjudged(self, record: Record, command: Command) -> Row:
        row = Row(record=record, judgement=None if record.status == "ok" else self._judgement(record), command=command)
        self.rows.append(row)
        return row

    def _keep(self, record: Record, *, predicted_for: str | None = None) -> None:
        """Write the record if a folder is given, so that a later run can reuse it; a prediction apart, by its GPU."""
        if self._settings.records is not None:
            folder = self._settings.records
            if predicted_for is not None:
                folder = folder / "predicted" / predicted_for.lower().replace(" ", "-")
            try:
                write_record(folder / f"{record.case.id}.json", record)
                if self.earlier is not None and predicted_for is None:
                    self.earlier.keep(record.case.id)
            except OSError as error:
                raise RecordError(f"the record cannot be written: {error.filename}: {error.strerror}.") from error

    def _judged(self, record: Record, command: Command) -> Row:
        judgement = self._judgement(record)
        row = Row(
            record=record,
            judgement=judgement,
            command=command,
            good_commit=self._review.good_commit(record) if judgement.verdict is Verdict.REGRESSED else None,
            grown=self._grown(record),
            cause=stored_cause(self._settings.baselines, record, judgement),
            expired=self._review.expired(record.case.id),
        )
        if self._settings.update and record.status == "ok":
            row = self._accepted(row)
        self.rows.append(row)
        return row

    def _grown(self, record: Record) -> tuple[str, ...]:
        if not record.makers_at_peak:
            return ()
        before = last_accepted(self._settings.baselines, record.circumstances.machine.key, record.case.id)
        return () if before is None else grown(before, record)

    def _judgement(self, record: Record) -> Judgement:
        return self._review.judged(record, self.alpha)

    def _accepted(self, row: Row) -> Row:
        try:
            acceptance = accept(
                self._settings.baselines,
                row.record,
                reason=self._settings.reason,
                allow_dirty=self._settings.allow_dirty,
            )
        except BaselineError as error:
            return msgspec.structs.replace(row, refused=str(error))
        # Judge again: accepting a number beyond the case's limit does not lift the limit.
        return msgspec.structs.replace(row, acceptance=acceptance, judgement=self._judgement(row.record))

    def close(self) -> None:
        """End all processes and remove the live line. May be called again."""
        self._launcher.close()
        if self._predicting is not None:
            self._predicting.close()
        self._progress.close()


def _device_of(case: Case) -> Literal["cpu", "cuda"]:
    return "cuda" if _device(case) == "cuda" else "cpu"


def _device(case: Case) -> Literal["auto", "cpu", "cuda"]:
    """Choose the device. A step of the user's own runs on the GPU if there is one, whatever its scale."""
    if not visible_gpus():
        return "auto"
    if isinstance(case.workload, CallableSpec) or case.scale != "tiny":
        return "cuda"
    return "auto"


def load_measuring_half() -> None:
    """Import torch and the measuring half, without the warnings of their imports."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("hpc_core.worker.perform")


def measure_here(
    case: Case, step: Callable[[], Any], emit: Callable[[Event], None], kind: Kind | None = None
) -> Record:
    """Measure calls of `step` in this process. Exceptions of the step propagate, for the traceback and for `--pdb`.

    Exact metrics are gated. Busy time is only reported, because it includes whatever else this process does.

    Raises:
        ModuleNotFoundError: torch is not installed.
        Exception: any exception of the step.
    """
    began = time.perf_counter()
    load_measuring_half()
    # Imported by name: the plugin must load, and collect, without torch.
    perform = importlib.import_module("hpc_core.worker.perform").perform
    job = Job(case=case, launched="inline", device="cuda" if visible_gpus() else "cpu", kind=kind or Measure())
    record: Record = perform(job, emit, began=began, step=step)
    circumstances = record.circumstances
    return msgspec.structs.replace(
        record,
        metrics={name: _ungated_time(metric) for name, metric in record.metrics.items()},
        circumstances=msgspec.structs.replace(circumstances, notes=(_NOTE, *circumstances.notes)),
    )


def _ungated_time(metric: Metric) -> Metric:
    return msgspec.structs.replace(metric, gated=False) if metric.noise == "busy" or metric.unit == "J" else metric
