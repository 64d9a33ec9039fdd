"""From what was seen of a worker to a record, whatever went wrong. Starts nothing and waits for nothing."""

from __future__ import annotations

import signal

import msgspec

from hpc_core.case.case import SCHEMA
from hpc_core.launch.follow import Seen
from hpc_core.record import environment
from hpc_core.record.job import Job
from hpc_core.record.record import Failure, FailureKind, Record

__all__ = ["record_of", "with_notes"]

_IMPORT = "import"
_DETAIL_CHARACTERS = 8000
"""A traceback and a tail of output, 4000 each."""


def record_of(job: Job, seen: Seen, output: str, notes: tuple[str, ...], *, foreign: bool) -> Record:
    """The worker's own record if it gave a good one, else a failed record that says what happened to the worker.

    Args:
        job: what was asked.
        seen: the worker's events, complete.
        output: end of what it printed.
        notes: remarks of the launcher, for the circumstances.
        foreign: the worker ran under another interpreter, whose stack this process cannot tell.
    """
    remarks = notes + _remarks(seen)
    record = seen.record
    if record is None or seen.malformed is not None or not _answers(job, record):
        return _failed(job, seen, output, remarks, foreign)
    if record.failure is not None and output:
        detail = f"{record.failure.detail}\n--- end of the worker's output ---\n{output}"[-_DETAIL_CHARACTERS:]
        record = msgspec.structs.replace(record, failure=msgspec.structs.replace(record.failure, detail=detail))
    return with_notes(record, remarks)


def with_notes(record: Record, notes: tuple[str, ...]) -> Record:
    """The same record with further notes in its circumstances."""
    if not notes:
        return record
    seen = msgspec.structs.replace(record.circumstances, notes=record.circumstances.notes + notes)
    return msgspec.structs.replace(record, circumstances=seen)


def _answers(job: Job, record: Record) -> bool:
    return record.schema == SCHEMA and record.case == job.case


def _remarks(seen: Seen) -> tuple[str, ...]:
    remarks = []
    if seen.exited is not None and seen.exited.leftovers:
        remarks.append(
            f"{seen.exited.leftovers} processes that the worker had started were still there and were ended."
        )
    if seen.record is not None and seen.exited is not None and seen.exited.signal is not None:
        remarks.append(f"The worker ended by {_name(seen.exited.signal)} after it had given its record.")
    return tuple(remarks)


def _failed(job: Job, seen: Seen, output: str, notes: tuple[str, ...], foreign: bool) -> Record:
    kind, message = _diagnosis(job, seen)
    failure = Failure(kind=kind, message=message, phase=seen.phase, detail=output)
    on_gpu = job.device == "cuda" or (job.device == "auto" and bool(environment.visible_gpus()))
    around = environment.circumstances(
        "cuda" if on_gpu else "cpu", job.launched, ceilings=job.ceilings, fault=job.fault, notes=notes
    )
    if foreign:
        remark = (
            "The worker's interpreter is another one; its versions are unknown, because it ended before it told them."
        )
        around = msgspec.structs.replace(around, stack={}, python="unknown", notes=(*notes, remark))
    return Record(case=job.case, status="failed", failure=failure, circumstances=around)


def _diagnosis(job: Job, seen: Seen) -> tuple[FailureKind, str]:
    case, exited, where = job.case.id, seen.exited, f"in phase {seen.phase!r}"
    if seen.malformed is not None:
        return "crash", f"{case}: a line from the worker is no event, so nothing it said is trusted: {seen.malformed}"
    if seen.record is not None:
        return "crash", _not_the_answer(job, seen.record)
    if seen.limit_s is not None:
        return "timeout", _timeout(case, seen)
    if exited is None:
        return "crash", (
            f"{case}: worker and supervisor ended {where} without a word. "
            "Run it again, and look for the OOM killer in the kernel's log."
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


def _not_the_answer(job: Job, record: Record) -> str:
    case = job.case
    if record.schema != SCHEMA:
        return (
            f"{case.id}: the worker's record has schema {record.schema}, this hpc-core reads {SCHEMA}: "
            "install the same hpc-core on both sides."
        )
    other = f"{record.case.id} with digest {record.case.digest}"
    return f"{case.id}: the worker answered with a record of another case, {other} instead of {case.digest}."


def _timeout(case: str, seen: Seen) -> str:
    if seen.phase == _IMPORT:
        return (
            f"{case}: the worker was still importing after {seen.limit_s:g} s, the limit for imports, and was ended. "
            "Where it hung is in the detail."
        )
    return (
        f"{case}: the worker was in phase {seen.phase!r} when its {seen.limit_s:g} s were over, and was ended with "
        "everything it had started. Where it hung is in the detail; if it only needs longer, raise timeout_s=."
    )


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # real-time signals have no names
        return f"signal {number}"
