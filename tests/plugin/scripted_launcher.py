"""A launcher that returns scripted records without running workers. A case's factory names the record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hpc_core.case.case import Case
from hpc_core.case.workloads import CallableSpec
from hpc_core.record.job import Event, Finished, Job, Phase, Way
from hpc_core.record.record import Circumstances, Failure, FailureKind, Metric, Record
from tests.strategies import CPU, STACK, busy, counted, wall

SAMPLES = (0.25, 0.5, 0.75)


class ScriptedLauncher:
    """Stands in for `hpc_core.launch.launcher.Launcher`.

    The factory's name decides: `scripted:step` is ok with the peak of its argument, `scripted:crash` fails with the kind of
    its argument, and `scripted:invalid` is INVALID.
    """

    def __init__(self, way: Way, *, on_event: Callable[[Case, Event], None], debug: bool = False) -> None:
        self._on_event = on_event

    def prepare(self) -> None:
        """Start nothing."""

    def close(self) -> None:
        """End nothing."""

    def run(self, job: Job) -> Record:
        """Return the record that the job's factory names."""
        workload = job.case.workload
        assert isinstance(workload, CallableSpec)
        self._on_event(job.case, Phase("measure"))
        record = _scripted_record(job, workload.factory.partition(":")[2], workload.arguments)
        self._on_event(job.case, Finished(record))
        return record


def _scripted_record(job: Job, outcome: str, arguments: dict[str, Any]) -> Record:
    around = Circumstances(
        machine=CPU, stack=STACK, python="3.11.7", host_cpu="some CPU", launched=job.launched,
        started_at="2026-11-24T12:00:00+00:00", fault=job.fault, commit=arguments.get("commit", "0123abc"),
        dirty=arguments.get("dirty"),
    )  # fmt: skip
    if outcome == "crash":
        kind: FailureKind = arguments.get("kind", "crash")
        failure = Failure(kind=kind, message="it went wrong.", phase="build", detail="Traceback: deep inside")
        return Record(case=job.case, status="failed", failure=failure, circumstances=around)
    peak = Metric(
        value=arguments.get("peak", 2**30), unit="bytes", noise="exact", better="lower", depends_on=("case", "stack")
    )
    samples = Metric(
        value=0.5, samples=SAMPLES, unit="s", noise="wall", better="lower", depends_on=wall().depends_on, gated=False
    )
    metrics = {"peak_bytes": peak, "operators": counted(), "step_s": samples}
    if "busy" in arguments:
        metrics["busy_s"] = busy(arguments["busy"])
    reasons = ("It ran without the quantization that was asked for.",) if outcome == "invalid" else ()
    return Record(
        case=job.case, status="invalid" if reasons else "ok", reasons=reasons, metrics=metrics, circumstances=around
    )
