"""What was seen when a case ran: metrics, audit, circumstances. Frozen values, equal to their JSON.

No torch, no I/O, no opinion: judging is `gate`'s work. A run that failed is a record too, with a reason.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import msgspec

from hpc_core.case.case import SCHEMA, Case
from hpc_core.case.errors import SpecError
from hpc_core.record.profile import Profile

Noise = Literal["exact", "busy", "wall"]
Better = Literal["lower", "higher", "same"]
Dependence = Literal["case", "stack", "machine"]
_BEYOND = 2**64
FailureKind = Literal[
    "out_of_memory", "crash", "timeout", "killed", "missing_library", "missing_data", "refused", "error", "interrupted"
]


class _Seen(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of everything seen: immutable, keyword-only, strict about unknown keys."""


class Metric(_Seen, frozen=True, kw_only=True):
    """One quantity: its value, or samples whose median is the value."""

    value: float | int
    samples: tuple[float, ...] | None = None
    unit: str
    """"bytes", "s", "1" for counts, "FLOP", "tokens/s", "ratio", "J", "GiB"."""
    noise: Noise
    better: Better
    depends_on: tuple[Dependence, ...]
    """What a baseline must share to be comparable: ("case",), ("case", "stack") or ("case", "stack", "machine")."""
    gated: bool = True
    """False: shown and stored, never judged (wall time, reserved bytes, shares of a ceiling)."""
    note: str | None = None
    """A caveat printed with the number, such as "extrapolated from 64 new tokens"."""

    def __post_init__(self) -> None:
        """A number that is no number never becomes a metric.

        Raises:
            SpecError: NaN, infinity or beyond 64 bits, in the value or a sample; no sample in the samples.
        """
        numbers = (self.value, *(self.samples or ()))
        # The range first: math.isfinite raises OverflowError for an int beyond the floats.
        if not all(
            -_BEYOND < number < _BEYOND if isinstance(number, int) else math.isfinite(number) for number in numbers
        ):
            raise SpecError(
                f"A metric must be finite and fit 64 bits, got {self.value!r} with samples {self.samples!r}."
            )
        if self.samples is not None and not self.samples:
            raise SpecError("A metric with samples needs at least one.")


class Fact(_Seen, frozen=True, kw_only=True):
    """One fact of the audit: what the case asked for, and what was seen in the live module or in what ran."""

    asked: Any
    seen: Any

    @property
    def holds(self) -> bool:
        """Whether what ran is what was asked."""
        return bool(self.asked == self.seen)


class Failure(_Seen, frozen=True, kw_only=True):
    """Why a run gave no numbers."""

    kind: FailureKind
    message: str
    """One or two sentences with the numbers and what to do next."""
    phase: str
    """The phase in which it happened: start, build, warm-up, measure …"""
    detail: str = ""
    """Traceback or end of the worker's output, for the curious."""


class Machine(_Seen, frozen=True, kw_only=True):
    """Where it ran. `key` names the folder of baselines: "cpu" for every CPU, the GPU's model and memory otherwise."""

    key: str
    name: str
    memory_bytes: int


class Circumstances(_Seen, frozen=True, kw_only=True):
    """Everything around a run that could explain a number."""

    machine: Machine
    stack: dict[str, str]
    """Versions of driver, cuda, torch, transformers, peft, bitsandbytes, accelerate; absent packages are left out."""
    python: str
    host_cpu: str
    launched: Literal["warm", "exec", "inline"]
    started_at: str
    """ISO 8601, UTC."""
    commit: str | None = None
    dirty: bool | None = None
    ceilings: dict[str, float] = {}
    """Measured in this session: matmul_flop_per_s by dtype, copy_bytes_per_s."""
    canary: dict[str, float] = {}
    """Seconds of work that no change of the code under test can move, "compute" and "memory", timed in this session."""
    gpu: dict[str, Any] = {}
    """`before`, `after`, and around the busy measurement: uuid, clocks in MHz, temperature, throttle reasons, other processes."""
    phase_s: dict[str, float] = {}
    """Seconds spent in each phase of the worker."""
    fault: str | None = None
    """Name of an injected fault; such a record never becomes a baseline."""
    notes: tuple[str, ...] = ()


class MemoryTimeline(_Seen, frozen=True, kw_only=True):
    """Live bytes of one step by category, at some hundred of its events; as asked for, without the allocator's rounding."""

    phases: tuple[str, ...]
    events: tuple[int, ...]
    """Allocations and frees since the step began, one number a sample."""
    phase: tuple[int, ...]
    """Index of the phase that each sample lies in; -1 before the first."""
    bytes_by_category: dict[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        """Columns of one length.

        Raises:
            SpecError: they differ, or a sample's phase is none.
        """
        lengths = {len(self.events), len(self.phase), *map(len, self.bytes_by_category.values())}
        if len(lengths) > 1 or any(not -1 <= index < len(self.phases) for index in self.phase):
            raise SpecError(f"A timeline has one phase and one value a category for each event, got {sorted(lengths)}.")

    @property
    def totals(self) -> tuple[int, ...]:
        """Live bytes of all categories, a sample each."""
        return tuple(map(sum, zip(*self.bytes_by_category.values(), strict=True))) or (0,) * len(self.events)


class KernelFamily(_Seen, frozen=True, kw_only=True):
    """What the kernels of one family took, as totals over the work that `kernels` counts."""

    seconds: float
    kernels: int


class Process(_Seen, frozen=True, kw_only=True):
    """One of the processes that a case's samples come from; those without a failure stand in the order of the samples."""

    started_at: str
    seconds: float
    """What the whole process took."""
    wall_s: dict[str, float] = {}
    """Median of each wall metric that it measured, in seconds."""
    gpu: dict[str, Any] = {}
    """As in the circumstances."""
    flags: tuple[str, ...] = ()
    """Why to doubt its sample: a throttled clock, another process on the GPU."""
    failure: str = ""
    """Why it gave no sample."""


class Record(_Seen, frozen=True, kw_only=True):
    """What was seen when a case ran."""

    schema: int = SCHEMA
    case: Case
    status: Literal["ok", "invalid", "failed"]
    """invalid: it ran, but not what was asked, or beyond what is possible; its numbers are neither gated nor stored."""
    failure: Failure | None = None
    metrics: dict[str, Metric] = {}
    audit: dict[str, Fact] = {}
    reasons: tuple[str, ...] = ()
    """Why the record is invalid, one sentence each."""
    makers_at_peak: dict[str, int] = {}
    """Bytes alive at the highest point by "category operator", the largest; where operators are watched, as in a prediction."""
    timeline: MemoryTimeline | None = None
    """Memory over the step that gave the categories, where it was asked for."""
    profile: Profile | None = None
    """Memory, operators and kernels by module, from a pass of its own. Kept beside the baseline, not in its history."""
    losses: tuple[float, ...] = ()
    """Loss of every step, from the first, in order."""
    answers: tuple[str, ...] = ()
    """Generated text or token ids, for the eye and for equivalence."""
    kernel_families: dict[str, KernelFamily] = {}
    """Where the GPU's time went in the first process, by family of kernels."""
    processes: tuple[Process, ...] = ()
    """Where the samples come from, the full process first; empty where it was the only one."""
    circumstances: Circumstances

    def __post_init__(self) -> None:
        """Status and content must agree.

        Raises:
            SpecError: a failed record without failure, an invalid one without reason, an ok one with either.
        """
        if (self.status == "failed") != (self.failure is not None):
            raise SpecError(
                f"A record fails with a failure, and only then: status {self.status!r}, failure {self.failure!r}."
            )
        if (self.status == "invalid") != bool(self.reasons):
            raise SpecError(
                f"A record is invalid for reasons, and only then: status {self.status!r}, reasons {self.reasons!r}."
            )

    @property
    def wall_samples(self) -> tuple[float, ...]:
        """Seconds a clock on the host saw, one a round: what pytest-benchmark's table shows. Empty when nothing was timed."""
        metric = self.metrics.get("step_s") or self.metrics.get("query_s")
        return () if metric is None else metric.samples or (float(metric.value),)


def record_to_json(record: Record, *, indent: int = 0) -> bytes:
    """JSON with sorted keys; `indent` spaces a level, 0 for one line."""
    text = msgspec.json.encode(record, order="sorted")
    return msgspec.json.format(text, indent=indent) if indent else text


def record_from_json(text: bytes | str) -> Record:
    """The record that this JSON says.

    Raises:
        SpecError: the JSON is malformed, of another schema, or contradicts itself; the message holds the path.
    """
    try:
        record = msgspec.json.decode(text, type=Record)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise SpecError(f"Not a record: {error}") from error
    if record.schema != SCHEMA:
        raise SpecError(f"The record has schema {record.schema}, this hpc-core reads {SCHEMA}.")
    return record
