"""What launcher and worker say to each other: one job in, a line of JSON an event, one record out.

Knows no process and no torch. Events travel on a file descriptor of their own, never on stdout.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from hpc_core.case.case import Case
from hpc_core.record.record import Record

Way = Literal["warm", "exec", "inline"]
"""How a worker is started: forked from a preloaded parent, as a fresh interpreter, or in this very process."""


class OperatorTime(msgspec.Struct, frozen=True, kw_only=True):
    """An operator or kernel in one step."""

    name: str
    calls: int
    own_s: float
    """Without what it calls."""
    whole_s: float


class TraceTable(msgspec.Struct, frozen=True, kw_only=True):
    """The operators of one step or phase that take the most time: what a worker leaves in `operators.json`."""

    device: Literal["cpu", "cuda"]
    """Whose time it is."""
    phase: str | None
    total_s: float
    """Of all operators, those that are not listed included."""
    operators: tuple[OperatorTime, ...]


class _Kind(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind"):
    """Base of the kinds of job."""


class Measure(_Kind, frozen=True, kw_only=True, tag="measure"):
    """Measure a case in full: time, memory, counters, the audit, the reference and what explains them."""

    timeline: bool = False
    """Also keep the memory over the step, in the record's `timeline`."""
    profile: bool = True
    """Also attribute one step to its modules, and measure energy on a GPU, in passes of their own after all that is gated."""
    audit: bool = True
    """False runs the case unchecked, to see what checking costs; the record is then INVALID, and says so."""


class Retime(_Kind, frozen=True, tag="retime"):
    """Measure every time, of the host and of the device, and no more, of a case that another process measured in full."""


class Trace(_Kind, frozen=True, kw_only=True, tag="trace"):
    """Write a profile of one warm step for the eye; the record is INVALID, and says so."""

    folder: str
    """Where trace, table and memory snapshot go."""
    phase: str | None = None
    """Only this phase of the step."""
    ranges: bool = False
    """Only NVTX ranges around `steps` steps, for one of NVIDIA's profilers that watches from outside; nothing is written."""
    steps: int = 3


class Predict(_Kind, frozen=True, kw_only=True, tag="predict"):
    """Predict a case on fake tensors for a GPU that need not be there."""

    gpu: str
    """Its name in `hpc_core.record.gpus`."""
    memory_bytes: int | None = None
    """The card's memory, if it has another amount than the table says."""
    timeline: bool = False
    """Also keep the memory over the step."""
    profile: bool = True
    """Also attribute the step to its modules."""
    memory_only: bool = False
    """Observe memory alone: no steps to count operators, kernels, FLOPs and the host's work."""


class MeasureCeilings(_Kind, frozen=True, kw_only=True, tag="ceilings"):
    """Measure the machine instead of the case; the record's circumstances hold what it reached."""

    canary: bool = False
    """Also time work that no change of the code under test can move."""


Kind = Measure | Retime | Trace | Predict | MeasureCeilings


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What one worker is asked to do: one kind of job, on one case."""

    case: Case
    kind: Kind = Measure()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    launched: Way = "exec"
    ceilings: dict[str, float] = {}
    """What this machine reaches, as measured earlier in the session: the numbers are shown as shares of it."""
    fault: str | None = None
    """Name of a fault from `hpc_core.faults` to inject before building."""


class Phase(msgspec.Struct, frozen=True, tag="phase", tag_field="event"):
    """The worker enters a phase: start, import, build, warm-up, measure, memory, busy, counters, audit."""

    name: str


class Finished(msgspec.Struct, frozen=True, tag="finished", tag_field="event"):
    """The worker has its record; nothing follows but its exit."""

    record: Record


class Exited(msgspec.Struct, frozen=True, tag="exited", tag_field="event"):
    """The supervisor saw the worker end, and has ended everything the worker left behind."""

    code: int | None
    signal: int | None
    leftovers: int
    """Processes that outlived the worker and were killed."""
    alive: tuple[int, ...] = ()
    """Ids of processes that could not be ended."""
    supervisor: str | None = None
    """How the supervisor itself ended, such as "SIGKILL", where that is why the worker was ended."""


Event = Phase | Finished | Exited


def encode_event(event: Event) -> bytes:
    """One line."""
    return msgspec.json.encode(event) + b"\n"


def decode_event(line: bytes) -> Event:
    """The event of one line.

    Raises:
        msgspec.MsgspecError: the line is no event.
    """
    event: Event = msgspec.json.decode(line, type=Event)
    return event
