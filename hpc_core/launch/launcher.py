"""One launcher, three ways: a job goes in, a record comes out, no process stays. Knows nothing of what a job does."""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from hpc_core.case.case import Case
from hpc_core.launch.channel import Channel
from hpc_core.launch.failures import record_of, with_notes
from hpc_core.launch.follow import Seen, follow
from hpc_core.launch.forkserver_client import NoWarmParent, WarmParent
from hpc_core.launch.fresh import start_cold
from hpc_core.launch.interpreter import executable
from hpc_core.record.job import (
    Event,
    Finished,
    Job,
    Preloaded,
    Way,
)
from hpc_core.record.record import Record

__all__ = ["PRELOAD_LIMIT_S", "Launcher"]

PRELOAD_LIMIT_S = 180.0
"""Seconds that imports may take, of the warm parent or of a cold worker. No part of a case's timeout."""
_SUPERVISOR_ENDS_S = 10.0


class Launcher:
    """Runs jobs, each in a process of its own; a context manager that leaves none behind.

    Several threads may run jobs at a time, except "inline": all they share is the warm parent, which forks one worker after
    the other, and each worker has descriptors of its own.

    Args:
        way: "warm" forks from a parent that has torch and transformers imported, "exec" starts a fresh interpreter,
            "inline" runs in this process. If the parent cannot preload, "warm" becomes "exec" and a note says so.
        python: the workers' interpreter; this one by default. Not for "inline".
        on_event: hears every event as it comes, in the thread that runs the job. What it raises ends the worker and leaves `run`.
        environment: variables that workers have beyond this process's. Not for "inline".
        folder: the workers' working directory, importable before anything that is installed; this process's by default.
            A checkout of hpc_core there is what its workers run. Not for "inline".
        debug: "inline" raises a case's error instead of recording it, for `--pdb`.
        preload_limit_s: seconds that imports may take.
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
    ) -> None:
        self._way: Way = way
        self._python = python
        self._on_event = on_event
        self._environment = environment
        self._folder = folder
        self._debug = debug
        self._preload_limit_s = preload_limit_s
        self._parent: WarmParent | None = None
        self._notes: tuple[str, ...] = ()
        self._starting = threading.RLock()
        """Held while the warm parent comes and goes."""

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
        """What the warm parent said of itself; None before the first warm job and in other ways."""
        return None if self._parent is None else self._parent.preloaded

    def prepare(self) -> None:
        """Start and preload the warm parent now rather than with the first job. Does nothing in other ways.

        Raises:
            LaunchError: the interpreter does not exist.
        """
        with self._starting:
            if self._way != "warm" or self._parent is not None:
                return
            try:
                self._parent = WarmParent(
                    executable(self._python),
                    self._environment,
                    preload_limit_s=self._preload_limit_s,
                    folder=self._folder,
                )
            except NoWarmParent as reason:
                self._fall_back(reason)

    def _fall_back(self, reason: NoWarmParent) -> None:
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
            KeyboardInterrupt: after the worker and everything it started is gone.
        """
        if self._way == "inline":
            return self._run_inline(msgspec.structs.replace(job, launched="inline"))
        self.prepare()
        try:
            return self._run_process(msgspec.structs.replace(job, launched=self._way))
        except NoWarmParent as reason:  # it ended between two jobs; nothing has run yet
            self._fall_back(reason)
            return self._run_process(msgspec.structs.replace(job, launched=self._way))

    def close(self) -> None:
        """End the warm parent. May be called again; a later job starts another one."""
        with self._starting:
            parent, self._parent = self._parent, None
            if parent is not None:
                parent.close()

    def _tell(self, job: Job, event: Event) -> None:
        if self._on_event is not None:
            self._on_event(job.case, event)

    def _run_inline(self, job: Job) -> Record:
        # Named, not imported: a launcher that starts processes must load without what a worker needs.
        run_job = importlib.import_module("hpc_core.worker.main").run_job
        record: Record = run_job(job, lambda event: self._tell(job, event), debug=self._debug)
        if record.failure is not None and record.failure.kind == "interrupted":
            raise KeyboardInterrupt  # in this process it was meant for the whole session
        self._tell(job, Finished(record))
        return with_notes(record, self._notes)

    def _run_process(self, job: Job) -> Record:
        with Channel(job) as channel:
            supervisor = self._start(channel)
            try:
                seen = self._follow(channel, job)
            finally:
                if supervisor is not None:
                    _reap(supervisor)
            foreign = self._python is not None and executable(self._python) != sys.executable
            return record_of(job, seen, channel.output_tail(), self._notes, foreign=foreign)

    def _start(self, channel: Channel) -> subprocess.Popen[bytes] | None:
        """The supervisor, where it is this process's child."""
        with self._starting:  # one request at a time on the warm parent's line
            if self._parent is not None:
                self._parent.start(channel)
                return None
        return start_cold(channel, executable(self._python), self._environment, self._folder)

    def _follow(self, channel: Channel, job: Job) -> Seen:
        return follow(
            channel,
            timeout_s=job.case.timeout_s,
            import_limit_s=self._preload_limit_s,
            tell=lambda event: self._tell(job, event),
        )


def _reap(supervisor: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        supervisor.wait(_SUPERVISOR_ENDS_S)
        return
    supervisor.kill()
    supervisor.wait()
