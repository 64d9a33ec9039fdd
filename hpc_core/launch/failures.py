"""Turn what was observed of a worker into a record, whatever went wrong. Starts nothing and waits for nothing."""

from __future__ import annotations

import signal

import msgspec

from hpc_core.case.case import SCHEMA
from hpc_core.launch.channel import Observed
from hpc_core.record import environment
from hpc_core.record.job import Job
from hpc_core.record.record import Failure, FailureKind, Record
from hpc_core.record.units import counted

_DETAIL_CHARACTERS = 8000  # a traceback and a tail of output, 4000 each


def record_of(job: Job, observed: Observed, output: str, notes: tuple[str, ...], *, foreign: bool) -> Record:
    """Return the worker's own record if it gave a valid one, else a failed record that says what happened.

    Args:
        job: the worker's job.
        observed: the worker's events, complete.
        output: the end of what it printed.
        notes: remarks of the launcher, for the circumstances.
        foreign: the worker ran under another interpreter, whose versions this process cannot know.
    """
    remarks = notes + _remarks(observed)
    record = observed.record
    if record is None or observed.malformed is not None or not _matches(job, record):
        return _failed(job, observed, output, remarks, foreign)
    if record.failure is not None and output:
        detail = f"{record.failure.detail}\n--- end of the worker's output ---\n{output}"[-_DETAIL_CHARACTERS:]
        record = msgspec.structs.replace(record, failure=msgspec.structs.replace(record.failure, detail=detail))
    return with_notes(record, remarks)


def with_notes(record: Record, notes: tuple[str, ...]) -> Record:
    """Return the record with further notes in its circumstances."""
    if not notes:
        return record
    circumstances = msgspec.structs.replace(record.circumstances, notes=record.circumstances.notes + notes)
    return msgspec.structs.replace(record, circumstances=circumstances)


def _matches(job: Job, record: Record) -> bool:
    return record.schema == SCHEMA and record.case == job.case


def _remarks(observed: Observed) -> tuple[str, ...]:
    remarks = []
    if observed.exited is not None and observed.exited.leftovers:
        remarks.append(
            f"{counted(observed.exited.leftovers, 'process', 'processes')} started by the worker outlived it and had to be ended."
        )
    if observed.record is not None and observed.exited is not None and observed.exited.signal is not None:
        remarks.append(f"The worker ended by {_name(observed.exited.signal)} after it had given its record.")
    if alive := _alive(observed):
        remarks.append(
            f"Processes that the worker had started could not be ended: {', '.join(map(str, alive))}. End them before the next run."
        )
    return tuple(remarks)


def _alive(observed: Observed) -> tuple[int, ...]:
    return observed.alive if observed.exited is None else (*observed.exited.alive, *observed.alive)


def _failed(job: Job, observed: Observed, output: str, notes: tuple[str, ...], foreign: bool) -> Record:
    kind, message = _diagnosis(job, observed)
    failure = Failure(kind=kind, message=message, phase=observed.phase, detail=output)
    on_gpu = job.device == "cuda" or (job.device == "auto" and bool(environment.visible_gpus()))
    circumstances = environment.circumstances(
        "cuda" if on_gpu else "cpu", job.launched, ceilings=job.ceilings, fault=job.fault, notes=notes
    )
    if foreign:
        remark = "The worker's interpreter is another one; its versions are unknown, because it ended before it reported them."
        circumstances = msgspec.structs.replace(circumstances, stack={}, python="unknown", notes=(*notes, remark))
    return Record(case=job.case, status="failed", failure=failure, circumstances=circumstances)


def _diagnosis(job: Job, observed: Observed) -> tuple[FailureKind, str]:
    case, exited, where = job.case.id, observed.exited, f"in phase {observed.phase!r}"
    if observed.malformed is not None:
        return (
            "crash",
            f"{case}: {observed.malformed}, so nothing that it sent is trusted. The code under test wrote to a descriptor that is not its own.",
        )
    if observed.record is not None:
        return "crash", _wrong_record(job, observed.record)
    if observed.limit_s is not None:
        return "timeout", _timeout(case, observed)
    if exited is None:
        return "crash", (
            f"{case}: worker and supervisor ended {where} without a report, so programs that the worker had started may still run. "
            "Run it again, and look for the OOM killer in the kernel's log."
        )
    if exited.supervisor is not None:
        return "killed" if exited.supervisor == "SIGKILL" else "crash", (
            f"{case}: the worker's supervisor was ended ({exited.supervisor}) {where}, and the worker with it. If the code under test "
            "did not kill its parent process, look for the OOM killer in the kernel's log."
        )
    if exited.signal == signal.SIGKILL:
        return "killed", (
            f"{case}: something else killed the worker (SIGKILL) {where}. The host may be out of memory: look for the "
            "OOM killer in the kernel's log, lower batch or length, or give the host or its container more memory."
        )
    if exited.signal is not None:
        return (
            "crash",
            f"{case}: the worker crashed with {_name(exited.signal)} {where}; the detail shows where it was.",
        )
    return "crash", (
        f"{case}: the worker ended with exit code {exited.code} {where}, without a record; "
        "what it printed last is in the detail."
    )


def _wrong_record(job: Job, record: Record) -> str:
    case = job.case
    if record.schema != SCHEMA:
        return (
            f"{case.id}: the worker's record has schema {record.schema}, this hpc-core reads {SCHEMA}: "
            "install the same hpc-core on both sides."
        )
    other = f"{record.case.id} with digest {record.case.digest}"
    return f"{case.id}: the worker returned the record of another case, {other} instead of {case.digest}."


def _timeout(case: str, observed: Observed) -> str:
    all_ended = "" if _alive(observed) else " with everything it had started"
    if observed.phase == "import":
        return (
            f"{case}: the worker was still importing after {observed.limit_s:g} s, the limit for imports, and was ended{all_ended}. "
            "Where it hung is in the detail."
        )
    return (
        f"{case}: the worker was in phase {observed.phase!r} when its {observed.limit_s:g} s were over, and was ended{all_ended}. "
        "Where it hung is in the detail; if it only needs longer, raise timeout_s=."
    )


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # real-time signals have no names
        return f"signal {number}"
