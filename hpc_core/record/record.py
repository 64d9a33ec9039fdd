"""What was observed when a case ran: metrics, audit, circumstances. Frozen values, equal to their JSON.

A failed run is also a record, with its reason. The gate judges records.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import msgspec

from hpc_core.case.case import SCHEMA, Case
from hpc_core.case.errors import SpecError
from hpc_core.record.plain import all_plain, fits, is_suspect, may_not_fit, plain, plain_json
from hpc_core.record.profile import Profile

Noise = Literal["exact", "busy", "wall"]
Better = Literal["lower", "higher", "same"]
Dependence = Literal["case", "stack", "machine", "python"]
_BEYOND = 2**64
_LONGEST_REASON = 300
"""Characters of a parser's message that are repeated."""
FailureKind = Literal[
    "out_of_memory", "crash", "timeout", "killed", "missing_library", "missing_data", "refused", "error", "interrupted"
]


class _Seen(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of every part of a record: immutable, keyword-only, strict about unknown keys."""


class Metric(_Seen, frozen=True, kw_only=True):
    """One quantity: its value, or samples whose median is the value."""

    value: float | int
    samples: tuple[float, ...] | None = None
    unit: str
    """"bytes", "s", "1" for counts, "FLOP", "tokens/s", "ratio", "J", "GiB"."""
    noise: Noise
    better: Better
    depends_on: tuple[Dependence, ...]
    """What a baseline must share to be comparable: ("case",), ("case", "stack") or ("case", "stack", "machine"), and
    "python" for Python's minor version."""
    gated: bool = True
    """False: shown and stored, never judged (wall time, reserved bytes, shares of a ceiling)."""
    note: str | None = None
    """A caveat printed with the number, such as "extrapolated from 64 new tokens"."""

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            SpecError: the value or a sample is NaN, infinite or beyond 64 bits, or `samples` is empty.
        """
        numbers = (self.value, *(self.samples or ()))
        # Check the range first: math.isfinite raises OverflowError for an int beyond the range of floats.
        if not all(
            -_BEYOND < number < _BEYOND if isinstance(number, int) else math.isfinite(number) for number in numbers
        ):
            raise SpecError(
                f"A metric must be finite and fit 64 bits, got {self.value!r} with samples {self.samples!r}."
            )
        if self.samples is not None and not self.samples:
            raise SpecError("A metric with samples needs at least one.")


class Fact(_Seen, frozen=True, kw_only=True):
    """One fact of the audit: what the case asked for, and what was observed in the live module or during the run."""

    asked: Any
    seen: Any

    @property
    def holds(self) -> bool:
        """Return whether what ran is what was asked for."""
        return bool(self.asked == self.seen)


class Failure(_Seen, frozen=True, kw_only=True):
    """Why a run gave no numbers."""

    kind: FailureKind
    message: str
    """One or two sentences with the numbers and what to do next."""
    phase: str
    """The phase in which it happened: start, build, warm-up, measure, …"""
    detail: str = ""
    """The traceback or the end of the worker's output."""


class Machine(_Seen, frozen=True, kw_only=True):
    """Where it ran. `key` is the name of the folder of baselines: "cpu" for every CPU, otherwise the GPU's model and memory."""

    key: str
    name: str
    memory_bytes: int


class Circumstances(_Seen, frozen=True, kw_only=True):
    """Everything around a run that could explain a number."""

    machine: Machine
    stack: dict[str, str]
    """Versions of driver, cuda, torch, transformers, peft, bitsandbytes, accelerate, … Packages that are not installed are left out."""
    python: str
    settings: dict[str, str] | None = None
    """Environment variables and switches of torch that change what runs, where they are not the default; None: not known."""
    host_cpu: str
    launched: Literal["warm", "exec", "inline"]
    started_at: str
    """ISO 8601, UTC."""
    commit: str | None = None
    dirty: bool | None = None
    ceilings: dict[str, float] = {}
    """Measured in this session: matmul_flop_per_s by dtype, copy_bytes_per_s."""
    canary: dict[str, float] = {}
    """Seconds of reference work that the code under test cannot change, "compute" and "memory", timed in this session."""
    gpu: dict[str, Any] = {}
    """State `before`, `after` and around the `busy` measurement: uuid, clocks in MHz, temperature, throttle reasons, other processes.
    `busy` also holds the `clock` meanwhile (`hpc_core.record.gpu_state.Clock`)."""
    phase_s: dict[str, float] = {}
    """Seconds spent in each phase of the worker."""
    fault: str | None = None
    """Name of an injected fault; such a record never becomes a baseline."""
    notes: tuple[str, ...] = ()


class MemoryTimeline(_Seen, frozen=True, kw_only=True):
    """Live bytes of one step by category, at a few hundred of its events. Requested bytes, without the allocator's rounding."""

    phases: tuple[str, ...]
    events: tuple[int, ...]
    """Allocations and frees since the step began, one number per sample."""
    phase: tuple[int, ...]
    """Index of each sample's phase; -1 before the first."""
    bytes_by_category: dict[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        """Check that the columns fit together.

        Raises:
            SpecError: their lengths differ, or a sample's phase does not exist.
        """
        lengths = {len(self.events), len(self.phase), *map(len, self.bytes_by_category.values())}
        if len(lengths) > 1 or any(not -1 <= index < len(self.phases) for index in self.phase):
            raise SpecError(
                f"A timeline needs one phase and one value per category for each event, got columns of {sorted(lengths)}."
            )

    @property
    def totals(self) -> tuple[int, ...]:
        """Return the live bytes of all categories together, one number per sample."""
        return tuple(map(sum, zip(*self.bytes_by_category.values(), strict=True))) or (0,) * len(self.events)


class KernelFamily(_Seen, frozen=True, kw_only=True):
    """Totals of one family of kernels, over the work that the metric `kernels` counts."""

    seconds: float
    kernels: int


class Process(_Seen, frozen=True, kw_only=True):
    """One of the processes that a case's samples come from. Those without a failure are in the order of the samples."""

    started_at: str
    seconds: float
    """Seconds of the whole process."""
    wall_s: dict[str, float] = {}
    """Value of each wall metric that has samples and was not disturbed, in the metric's unit."""
    gpu: dict[str, Any] = {}
    """As in `Circumstances.gpu`."""
    flags: tuple[str, ...] = ()
    """Why to doubt its sample: a throttled clock, another process on the GPU."""
    failure: str = ""
    """Why it gave no sample."""


class Record(_Seen, frozen=True, kw_only=True):
    """What was observed when a case ran."""

    schema: int = SCHEMA
    case: Case
    status: Literal["ok", "invalid", "failed"]
    """invalid: something else ran than was asked for, or the numbers are impossible. They are neither gated nor stored."""
    failure: Failure | None = None
    metrics: dict[str, Metric] = {}
    audit: dict[str, Fact] = {}
    reasons: tuple[str, ...] = ()
    """Why the record is invalid, one sentence each."""
    makers_at_peak: dict[str, int] = {}
    """The largest entries of the bytes alive at the peak, by "category operator". Only if operators were watched, as in a prediction."""
    timeline: MemoryTimeline | None = None
    """Memory over the step that the categories were measured in, if requested."""
    profile: Profile | None = None
    """Memory, operators and kernels by module, from a separate pass. Stored beside the baseline, not in its history."""
    losses: tuple[float, ...] = ()
    """The loss of every step, in order."""
    answers: tuple[str, ...] = ()
    """Generated text or token ids, to read and to compare."""
    kernel_families: dict[str, KernelFamily] = {}
    """GPU time of the first process, by family of kernels."""
    processes: tuple[Process, ...] = ()
    """The processes that the samples come from, the full one first; empty if there was only one."""
    circumstances: Circumstances

    def __post_init__(self) -> None:
        """Check that status and content agree.

        Raises:
            SpecError: a failed record without a failure, an invalid one without reasons, an ok one with either.
        """
        if (self.status == "failed") != (self.failure is not None):
            raise SpecError(
                f"A record has a failure exactly if its status is 'failed', got status {self.status!r} and failure {self.failure!r}."
            )
        if (self.status == "invalid") != bool(self.reasons):
            raise SpecError(
                f"A record has reasons exactly if its status is 'invalid', got status {self.status!r} and reasons {self.reasons!r}."
            )

    @property
    def wall_samples(self) -> tuple[float, ...]:
        """Return the wall seconds of each round, as shown in pytest-benchmark's table; empty if nothing was timed."""
        metric = self.metrics.get("step_s") or self.metrics.get("query_s")
        return () if metric is None else metric.samples or (float(metric.value),)


def record_to_json(record: Record, *, indent: int = 0) -> bytes:
    """Return JSON with sorted keys, indented by `indent` spaces per level; 0 gives one line."""
    return plain_json(record, indent=indent)


def record_from_json(text: bytes | str) -> Record:
    """Parse a record, and make its texts plain: it may come from strangers, and its texts are printed.

    Raises:
        SpecError: the JSON is malformed, of another schema, or contradicts itself; the message contains the path.
    """
    try:
        raw = text.encode() if isinstance(text, str) else text
        schema = schema_of(raw)
        if schema != SCHEMA:
            raise SpecError(f"The record has schema {schema}, this hpc-core reads {SCHEMA}.")
        record = msgspec.json.decode(raw, type=Record)
        if may_not_fit(raw) and not fits(msgspec.to_builtins(record)):
            raise SpecError("Not a record: a whole number in it does not fit 64 bits.")
        return _plain_record(record) if is_suspect(raw) else record
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise SpecError(f"Not a record: {plain(str(error), _LONGEST_REASON)}") from error


def schema_of(raw: bytes) -> int:
    """Return the schema that a record states.

    Raises:
        msgspec.MsgspecError, UnicodeError, RecursionError: it is not a JSON object, or its schema is not a number.
    """
    return msgspec.json.decode(raw, type=_SchemaOnly).schema


class _SchemaOnly(msgspec.Struct):
    schema: int = SCHEMA


def _plain_record(record: Record) -> Record:
    # The case stays as it is, for its digest; what is shown of it is quoted.
    content = msgspec.to_builtins(record)
    return msgspec.convert(
        {name: each if name == "case" else all_plain(each) for name, each in content.items()}, Record
    )
