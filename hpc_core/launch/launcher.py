"""Run jobs: a job goes in, a record comes out, no process stays. Knows nothing of what a job does."""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from hpc_core.case.case import Case
from hpc_core.case.workloads import FinetuneSpec
from hpc_core.launch.channel import Channel
from hpc_core.launch.failures import record_of, with_notes
from hpc_core.launch.forkserver import Preloaded
from hpc_core.launch.forkserver_client import Forkserver, NoForkserver
from hpc_core.launch.interpreter import executable, start_fresh
from hpc_core.record.environment import named_commit
from hpc_core.record.job import (
    Event,
    Finished,
    Job,
    Way,
)
from hpc_core.record.record import Record

PRELOAD_LIMIT_S = 180.0
"""Seconds that imports may take, in the forkserver or in a fresh worker. Not part of a case's timeout."""
_SUPERVISOR_ENDS_S = 10.0


class Launcher:
    """Runs jobs, each in a process of its own; a context manager that leaves none behind.

    Several threads may run jobs at a time, except "inline": all they share is the forkserver, and each worker has descriptors of its own.

    Args:
        way: "warm" forks from a forkserver that has torch and transformers imported, "exec" starts a fresh interpreter,
            "inline" runs in this process. If the forkserver cannot preload, "warm" becomes "exec" and a note says so.
        python: the workers' interpreter; this one by default. Not for "inline".
        on_event: called with every event as it comes, in the thread that runs the job. What it raises ends the worker and leaves `run`.
        environment: variables that workers have beyond this process's. Not for "inline".
        folder: the workers' working directory, importable before anything that is installed; this process's by default.
            A checkout of hpc_core there is what its workers run. Not for "inline".
        debug: "inline" raises a case's error instead of recording it, for `--pdb`.
        preload_limit_s: seconds that imports may take.
        predicting: whether the jobs are predictions, so that a forkserver loads the fake CUDA device.
        preload: further packages for a forkserver to import, as far as workers can use CUDA afterwards (`preloadable`).
    """

    def __init__(
        self,
        way: Way = "warm",
        *,
        python: str | os.PathLike[str] | None = None,
        on_event: Callable[[Case, Event], None] | None = None,
        environment: dict[str, str] | None = None,
        folder: Path | None = None,
        debug: bool = False,
        preload_limit_s: float = PRELOAD_LIMIT_S,
        predicting: bool = False,
        preload: Sequence[str] = (),
    ) -> None:
        """Start nothing yet.

        Raises:
            SpecError: HPC_CORE_COMMIT names no commit, so that no record could be made.
        """
        named_commit()
        self._way: Way = way
        self._python = python
        self._on_event = on_event
        self._environment = environment
        self._folder = folder
        self._debug = debug
        self._preload_limit_s = preload_limit_s
        self._predicting = predicting
        self.preload = tuple(preload)
        """May be set until the forkserver starts."""
        self._forkserver: Forkserver | None = None
        self._notes: tuple[str, ...] = ()
        self._starting = threading.RLock()
        """Held while the forkserver starts and ends."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def way(self) -> Way:
        """How the next job is launched: what was asked for, unless a failed preload moved it to "exec"."""
        return self._way

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of this launcher's records should know; each record's circumstances hold it too."""
        return self._notes

    @property
    def preloaded(self) -> Preloaded | None:
        """What the forkserver reported of itself; None before the first warm job and in other ways."""
        return None if self._forkserver is None else self._forkserver.preloaded

    def prepare(self) -> None:
        """Start the forkserver now rather than with the first job. Does nothing in other ways.

        Raises:
            LaunchError: the interpreter does not exist.
        """
        with self._starting:
            if self._way != "warm" or self._forkserver is not None:
                return
            try:
                self._forkserver = Forkserver(
                    executable(self._python),
                    self._environment,
                    preload_limit_s=self._preload_limit_s,
                    folder=self._folder,
                    predicting=self._predicting,
                    preload=self.preload,
                )
            except NoForkserver as reason:
                self._fall_back(reason)

    def _fall_back(self, reason: NoForkserver) -> None:
        with self._starting:
            if self._way != "warm":
                return  # another thread found out first
            self.close()
            self._way = "exec"
            self._notes = (*self._notes, f"Launched by exec instead of warm: {reason}")

    def run(self, job: Job) -> Record:
        """Run one job and return its record; a worker that crashes, hangs or is killed is a failed record.

        Raises:
            LaunchError: no worker can be started at all.
            KeyboardInterrupt: after the worker and everything it started has ended.
        """
        if self._way == "inline":
            return self._run_inline(msgspec.structs.replace(job, launched="inline"))
        self.prepare()
        try:
            return self._run_process(msgspec.structs.replace(job, launched=self._way))
        except NoForkserver as reason:  # it ended between two jobs; nothing has run yet
            self._fall_back(reason)
            return self._run_process(msgspec.structs.replace(job, launched=self._way))

    def close(self) -> None:
        """End the forkserver. May be called again; a later job starts another one."""
        with self._starting:
            forkserver, self._forkserver = self._forkserver, None
            if forkserver is not None:
                forkserver.close()

    def _report(self, job: Job, event: Event) -> None:
        if self._on_event is not None:
            self._on_event(job.case, event)

    def _run_inline(self, job: Job) -> Record:
        # Named, not imported: a launcher that starts processes must load without what a worker needs.
        run_job = importlib.import_module("hpc_core.worker.main").run_job
        record: Record = run_job(job, lambda event: self._report(job, event), debug=self._debug)
        if record.failure is not None and record.failure.kind == "interrupted":
            raise KeyboardInterrupt  # in this process it was meant for the whole session
        self._report(job, Finished(record))
        return with_notes(record, self._notes)

    def _run_process(self, job: Job) -> Record:
        with Channel(job) as channel:
            supervisor = self._start(channel)
            try:
                observed = channel.follow(
                    timeout_s=job.case.timeout_s,
                    import_limit_s=self._preload_limit_s,
                    on_event=lambda event: self._report(job, event),
                )
            finally:
                if supervisor is not None:
                    _reap(supervisor)
            foreign = self._python is not None and executable(self._python) != sys.executable
            return record_of(job, observed, channel.output_tail(), self._notes, foreign=foreign)

    def _start(self, channel: Channel) -> subprocess.Popen[bytes] | None:
        """Start a worker; return the supervisor where it is this process's child."""
        with self._starting:  # one request at a time on the forkserver's socket
            if self._forkserver is not None:
                self._forkserver.start(channel)
                return None
        return start_fresh(channel, executable(self._python), self._environment, self._folder)


def _reap(supervisor: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        supervisor.wait(_SUPERVISOR_ENDS_S)
        return
    supervisor.kill()
    supervisor.wait()


def preloadable(cases: Sequence[Case]) -> tuple[str, ...]:
    """Return the modules beyond torch's and transformers' first ones that workers of these cases import: a second or more each."""
    names = ["torch._dynamo"]
    if any(case.adapter is not None for case in cases):
        names.append("peft")
    if any(_uses_bitsandbytes(case) for case in cases):
        names.append("bitsandbytes")
    return tuple(names)


def _uses_bitsandbytes(case: Case) -> bool:
    quantizes = case.quantization is not None and case.quantization.kind != "int4"
    return quantizes or (isinstance(case.workload, FinetuneSpec) and "8bit" in case.workload.optimizer)
