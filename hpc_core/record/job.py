"""What launcher and worker say to each other: one job in, a line of JSON an event, one record out.

Knows no process and no torch. Events travel on a file descriptor of their own, never on stdout.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from hpc_core.case.case import Case
from hpc_core.record.record import Record

__all__ = [
    "FAKE_CUDA",
    "PRELOAD_MORE",
    "Event",
    "Exited",
    "Finished",
    "Job",
    "OperatorTime",
    "Phase",
    "Preloaded",
    "Request",
    "Trace",
    "TraceTable",
    "Way",
    "decode_event",
    "encode_event",
]

FAKE_CUDA = "HPC_CORE_FAKE_CUDA"
"""Environment variable of a warm parent whose workers predict: "1" loads the empty CUDA device before torch."""

PRELOAD_MORE = "HPC_CORE_PRELOAD_MORE"
"""Environment variable of a warm parent: packages, by commas, that it imports too. Refused where CUDA can be had: see `zygote`."""

Way = Literal["warm", "exec", "inline"]
"""How a worker is started: forked from a preloaded parent, as a fresh interpreter, or in this very process."""


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """A profile for the eye is wanted, not a measurement."""

    folder: str
    """Where trace, table and memory snapshot go."""
    phase: str | None = None
    """Only this phase of the step."""
    ranges: bool = False
    """Only NVTX ranges around `steps` steps, for a profiler of NVIDIA's that watches from outside; nothing is written."""
    steps: int = 3


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


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What one worker is asked to do."""

    case: Case
    launched: Way = "exec"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    ceilings: dict[str, float] = {}
    """Ceilings measured earlier in this session, to stand beside the numbers."""
    fault: str | None = None
    """Name of a fault from `hpc_core.faults` to inject before building."""
    predict: str | None = None
    """Name of a GPU from `hpc_core.record.gpus`: predict the case for it on fake tensors, instead of running it."""
    timeline: bool = False
    """Also keep the memory over the step, in the record's `timeline`."""
    trace: Trace | None = None
    """Only build, warm up and profile for the eye; the record is then INVALID, and says so."""
    profile: bool = True
    """Also take one unit of the work apart by module, and its energy on a GPU, in passes of their own after all that is gated."""
    audit: bool = True
    """False runs the case unchecked, to see what checking costs; the record is then INVALID, and says so."""
    measure_ceilings: bool = False
    """Measure the machine's ceilings instead of the case; the record's circumstances hold them."""
    canary: bool = False
    """Time work that no change of the code under test can move, instead of the case; the record's circumstances hold it."""
    replicate: bool = False
    """Another process of a case that was measured in full: only build, warm up, and measure busy time and launches (on a CPU: wall time)."""
    timed_again: bool = False
    """Another process of a case that was measured in full, to be compared with one of other code: build, warm up, and take every time
    that the full one takes, by the clock and of the device; and look whether its engine is the one asked for. A worker of an older
    revision does not know the word, and measures in full."""


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


Event = Phase | Finished | Exited


class Preloaded(msgspec.Struct, frozen=True, kw_only=True):
    """The warm parent is ready to fork workers; said once, by itself, about itself."""

    pid: int
    seconds: float
    """What importing torch and transformers took."""
    modules: tuple[str, ...]
    """Every module it has imported."""
    cuda_initialized: bool


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """Asks the warm parent for one worker; the descriptors of job, events, life and output travel with it."""

    folder: str
    """Working directory."""
    environment: dict[str, str | None] = {}
    """What changed in the launcher's environment since the parent started; None unsets."""


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
