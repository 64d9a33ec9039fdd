"""Cases, metrics and records for tests: functions that make examples, and hypothesis strategies."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from hpc_core.baselines.baseline import Baseline
from hpc_core.baselines.lookup import find
from hpc_core.case.case import Case
from hpc_core.case.limits import Limits
from hpc_core.case.parts import (
    AdapterSpec,
    DataSpec,
    ModelSpec,
    QuantSpec,
)
from hpc_core.case.workloads import CallableSpec, FeedSpec, FinetuneSpec, GenerateSpec
from hpc_core.record.record import (
    Circumstances,
    Fact,
    Failure,
    Machine,
    Metric,
    Record,
    record_from_json,
)

CPU = Machine(key="cpu", name="some CPU", memory_bytes=2**34)
H100 = Machine(key="nvidia-h100-80gb-hbm3-80gib", name="NVIDIA H100 80GB HBM3", memory_bytes=80 * 2**30)
STACK = {"torch": "2.11.0+cu130", "transformers": "5.23.0", "peft": "0.21.0", "driver": "580.1"}


def a_case(case_id: str = "tiny/lora", **changes: Any) -> Case:
    """A tiny LoRA case."""
    parts: dict[str, Any] = {
        "scale": "tiny",
        "model": ModelSpec(shape="tiny"),
        "adapter": AdapterSpec(),
        "workload": FinetuneSpec(),
    }
    return Case(id=case_id, **(parts | changes))


def peak(value: float = 2 * 2**30, **changes: Any) -> Metric:
    """A peak of a real allocator: exact bytes that depend on the machine."""
    fields: dict[str, Any] = {"unit": "bytes", "noise": "exact", "better": "lower"}
    fields["depends_on"] = ("case", "stack", "machine")
    return Metric(value=value, **(fields | changes))


def counted(value: float = 1617, **changes: Any) -> Metric:
    """A count that depends on case and stack."""
    fields: dict[str, Any] = {"unit": "1", "noise": "exact", "better": "lower", "depends_on": ("case", "stack")}
    return Metric(value=value, **(fields | changes))


def busy(value: float = 0.25, **changes: Any) -> Metric:
    """GPU-busy seconds."""
    fields: dict[str, Any] = {"unit": "s", "noise": "busy", "better": "lower", "samples": (value, value, value)}
    fields["depends_on"] = ("case", "stack", "machine")
    return Metric(value=value, **(fields | changes))


def wall(value: float = 0.5, **changes: Any) -> Metric:
    """Seconds by the host's clock, shown only."""
    fields: dict[str, Any] = {"unit": "s", "noise": "wall", "better": "lower", "gated": False}
    fields["depends_on"] = ("case", "stack", "machine")
    return Metric(value=value, **(fields | changes))


def around(machine: Machine = H100, **changes: Any) -> Circumstances:
    """Circumstances on a machine."""
    fields: dict[str, Any] = {
        "stack": STACK,
        "python": "3.11.9",
        "host_cpu": "some CPU",
        "launched": "warm",
        "started_at": "2026-11-23T10:00:00+00:00",
        "commit": "0123abc",
        "dirty": False,
    }
    return Circumstances(machine=machine, **(fields | changes))


def a_record(metrics: dict[str, Metric] | None = None, *, case: Case | None = None, **changes: Any) -> Record:
    """An ok record with one metric of each kind."""
    if metrics is None:
        metrics = {"peak_bytes": peak(), "operators": counted(), "busy_s": busy(), "step_s": wall()}
    fields: dict[str, Any] = {"status": "ok", "circumstances": around()}
    return Record(case=case or a_case(), metrics=metrics, **(fields | changes))


def stored_baseline(root: Path, record: Record) -> Baseline:
    """The sound baseline of this record's case and machine in a folder."""
    found = find(root, record.circumstances.machine.key, record.case.id)
    assert isinstance(found, Baseline), found
    return found


def failed_record(kind: str = "out_of_memory") -> Record:
    """A record of a failed run."""
    failure: Any = {"kind": kind, "message": "80.1 GiB asked for, 79.6 GiB there.", "phase": "build"}
    return a_record({}, status="failed", failure=Failure(**failure))


@functools.cache
def committed_records() -> tuple[Record, ...]:
    """Every record in the histories of `baselines/`, the last of each history being the accepted one."""
    files = sorted((Path(__file__).parents[1] / "baselines").rglob("*.history.jsonl"))
    return tuple(record_from_json(line) for file in files for line in file.read_text().splitlines())


words = st.text(st.characters(codec="utf-8"), max_size=12)
names = st.from_regex(r"[a-z0-9][a-z0-9.+_-]{0,8}", fullmatch=True)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
positive = st.floats(min_value=1e-6, max_value=1e6)
percentages = st.decimals(min_value=0, max_value=50, places=2).map(lambda number: f"{number}%")
limits = st.builds(
    Limits,
    peak_bytes=st.none() | percentages | st.integers(1, 2**40),
    busy_s=st.none() | percentages | positive,
    operators=st.none() | st.integers(1, 10**6),
)
dtypes: st.SearchStrategy[Any] = st.sampled_from(["float32", "bfloat16", "float16"])
adapters = st.builds(
    AdapterSpec,
    rank=st.integers(1, 256),
    alpha=positive,
    dropout=st.floats(0, 1, exclude_max=True),
    targets=st.lists(st.sampled_from(["q_proj", "k_proj", "v_proj", "up_proj"]), min_size=1, unique=True).map(tuple),
    dtype=dtypes,
)
quantizations = st.one_of(
    st.builds(QuantSpec, kind=st.sampled_from(["nf4", "fp4"]), compute_dtype=dtypes, double_quant=st.booleans()),
    st.just(QuantSpec(kind="int8", compute_dtype="float16")),
)
random_rows = st.builds(DataSpec, seed=st.integers(0, 99), rows=st.none() | st.integers(1, 99))
feeds = st.just(FeedSpec()) | st.builds(
    FeedSpec, way=st.just("loader"), workers=st.integers(0, 8), pinned=st.booleans(), ahead=st.integers(0, 4)
)
finetunes = st.one_of(
    st.builds(
        FinetuneSpec,
        batch=st.integers(1, 64),
        length=st.integers(2, 4096),
        checkpointing=st.sampled_from(["off", "reentrant", "non-reentrant"]),
        learning_rate=positive,
        steps=st.integers(1, 1000),
        feed=feeds,
        data=random_rows,
    ),
    st.builds(
        FinetuneSpec,
        packing=st.just(True),
        data=st.builds(DataSpec, source=st.just("trace"), name=st.sampled_from(["gsm8k", "wikitext2"])),
    ),
)
generates = st.builds(
    GenerateSpec,
    batch=st.integers(1, 64),
    prompt_length=st.integers(1, 4096),
    new_tokens=st.integers(2, 4096),
    cache=st.sampled_from(["dynamic", "static", "off"]),
    data=random_rows,
)
callables = st.builds(
    CallableSpec,
    factory=st.just("mypkg.train:make_step"),
    arguments=st.dictionaries(words, json_values, max_size=3),
    steps=st.integers(1, 100),
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any valid case: fine-tuning, generation or a callable."""
    common: dict[str, Any] = {
        "id": f"my/{draw(names)}",
        "scale": draw(st.sampled_from(["tiny", "small", "full"])),
        "seed": draw(st.integers(0, 2**31)),
        "timeout_s": draw(positive),
        "limits": draw(limits),
    }
    workload: Any = draw(st.one_of(finetunes, generates, callables))
    if isinstance(workload, CallableSpec):
        return Case(workload=workload, **common)
    common["model"] = ModelSpec(
        shape=draw(st.sampled_from(["tiny", "llama-3.2-3b"])),
        layers=draw(st.sampled_from([None, 1, 2])),
        dtype=draw(dtypes),
    )
    if isinstance(workload, FinetuneSpec):
        common["adapter"] = draw(st.none() | adapters)
    if common.get("adapter") is not None or isinstance(workload, GenerateSpec):
        quantization = draw(st.none() | quantizations)
        common["quantization"] = quantization
    if common["id"].startswith("my/qlora") and common.get("quantization") is None:
        common["id"] = "my/case"
    return Case(workload=workload, **common)


@st.composite
def metrics(draw: st.DrawFn, *, least: int = 0) -> Metric:
    """Any metric: exact (at least `least`), busy or wall."""
    noise: Any = draw(st.sampled_from(["exact", "busy", "wall"]))
    dependences: list[Any] = [("case",), ("case", "stack"), ("case", "stack", "machine")]
    value: float = draw(st.integers(least, 2**63) if noise == "exact" else positive)
    samples: tuple[float, ...] | None = None
    if noise == "wall":
        samples = tuple(draw(st.lists(positive, min_size=1, max_size=4)))
    if noise == "busy":  # one value per process, a tenth of a percent apart, and their median
        samples = draw(st.sampled_from([None, (value,), (value * 0.999, value, value * 1.001)]))
    return Metric(
        value=value,
        samples=samples,
        unit=draw(st.sampled_from(["bytes", "1", "FLOP"])) if noise == "exact" else "s",
        noise=noise,
        better=draw(st.sampled_from(["lower", "higher", "same"])),
        depends_on=draw(st.sampled_from(dependences)),
        gated=draw(st.booleans()),
        note=draw(st.none() | words),
    )


@st.composite
def records(draw: st.DrawFn, *, acceptable: bool = False) -> Record:
    """Any record: ok, invalid or failed; if `acceptable`, one that may become a baseline."""
    status: Any = "ok" if acceptable else draw(st.sampled_from(["ok", "invalid", "failed"]))
    held = draw(st.dictionaries(names, metrics(least=1 if acceptable else 0), max_size=4))
    if acceptable:
        held["peak_bytes"] = peak(draw(st.integers(1, 2**45)))
    kind: Any = draw(st.sampled_from(["out_of_memory", "crash", "timeout"]))
    failure = Failure(kind=kind, message=draw(words), phase="build") if status == "failed" else None
    return Record(
        case=draw(cases()),
        status=status,
        failure=failure,
        metrics=held,
        audit={
            name: Fact(asked=draw(json_values), seen=draw(json_values)) for name in draw(st.sets(names, max_size=2))
        },
        reasons=("more tokens than asked for",) if status == "invalid" else (),
        losses=tuple(draw(st.lists(positive, max_size=3))),
        answers=tuple(draw(st.lists(words, max_size=2))),
        circumstances=around(
            draw(st.sampled_from([CPU, H100])),
            settings=draw(
                st.none() | st.dictionaries(st.sampled_from(["OMP_NUM_THREADS", "NVIDIA_TF32_OVERRIDE"]), words)
            ),
            notes=tuple(draw(st.lists(words, max_size=2))),
        ),
    )
