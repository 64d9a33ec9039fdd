"""The instruments against work of known size, through the whole measuring path, and what the audit costs. On a GPU; seconds in all.

Each test runs a factory of `hpc_core.instruments.known` in a worker of its own, as any user's step, and passes on its own assertions: what is
known needs no baseline. What the instrument says beside
what is known stands in the assertion, and in JUnit's properties as `known.*` and `seen.*`.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from hpc_core.case.case import Case
from hpc_core.case.limits import MiB
from hpc_core.case.parts import ModelSpec, QuantSpec
from hpc_core.catalogue import finetune, generate, lora
from hpc_core.plugin.fixture import Perf, PerfSession
from hpc_core.record.gpus import gpu_of
from hpc_core.record.job import Job, Measure, MeasureCeilings, Retime
from hpc_core.record.record import Record
from hpc_core.record.repeats import busy_values, merged

pytestmark = [pytest.mark.perf_gpu, pytest.mark.perf_on_request]

_SECONDS = 0.02
_WITHIN = 0.01
_PROFILED = 10
"""Number of steps over which kernels, copies and memsets are totals."""
_DELAY_S = 2e-3
"""Time in which a host must notice that the device has finished."""


@pytest.fixture
def against(request: pytest.FixtureRequest) -> Callable[[str, float, float], float]:
    """Return the relative error of a reading, and write it with both numbers into JUnit's report."""

    def error(name: str, seen: float, known: float) -> float:
        _note(request, f"known.{name}", known)
        _note(request, f"seen.{name}", seen)
        return seen / known - 1

    return error


def _note(request: pytest.FixtureRequest, name: str, value: object) -> None:
    # `record_property` is this line and a warning: JUnit's second format has no place for properties of a test, pytest writes them.
    request.node.user_properties.append((name, value))


def _value(record: Record, name: str) -> float:
    return float(record.metrics[name].value)


@pytest.mark.parametrize(
    ("times", "streams", "pause_s"),
    [
        pytest.param(1, 1, 0.0, id="one-sleep"),
        pytest.param(2, 1, 0.02, id="two-with-a-pause"),
        pytest.param(1, 2, 0.0, id="two-streams-at-once"),
    ],
)
def test_a_known_duration_is_seen_within_one_percent(
    perf: Perf, against: Callable[[str, float, float], float], times: int, streams: int, pause_s: float
) -> None:
    """Busy time equals the sleeps timed by CUDA events: pauses do not count, and two streams at once count once."""
    record = perf(
        "hpc_core.instruments.known:sleeping",
        seconds=_SECONDS,
        times=times,
        streams=streams,
        pause_s=pause_s,
        steps=5,
        device="cuda",
        judge=False,
    )
    known = times * _SECONDS
    busy = against("busy_s", _value(record, "busy_s"), known)
    assert abs(busy) < _WITHIN, f"busy_s is {_value(record, 'busy_s'):.6f} s, known are {known:.6f} s: {busy:+.3%}"
    waited = known + (times - 1) * pause_s
    wall = against("step_s", _value(record, "step_s"), waited)
    assert -_WITHIN < wall < _WITHIN + _DELAY_S / waited, f"step_s is {wall:+.3%} off the known {waited:.6f} s"
    assert record.metrics["kernels"].value == _PROFILED * times * streams
    waits = times - 1 if pause_s else 0
    assert record.metrics["synchronizations"].value == _PROFILED * waits


def test_known_bytes_are_seen_to_the_byte(perf: Perf, against: Callable[[str, float, float], float]) -> None:
    """Peaks by phase (the allocator's counters) and categories at the peak (its history) are exact to the byte."""
    unit = 16 * MiB
    record = perf("hpc_core.instruments.known:scheduled", unit_bytes=unit, steps=3, device="cuda", judge=False)
    known = {
        "peak_bytes": 7 * unit,
        "peak_first_bytes": 7 * unit,
        "peak_second_bytes": 5 * unit,
        "at_peak_other_bytes": 2 * unit,
        "at_peak_temporaries_bytes": 4 * unit,
        "at_peak_activations_bytes": unit,
        "at_peak_rounding_bytes": 0,
    }
    seen = {name: record.metrics[name].value for name in known}
    against("peak_bytes", seen["peak_bytes"], known["peak_bytes"])
    assert seen == known


def test_known_launches_are_counted_exactly(perf: Perf, against: Callable[[str, float, float], float]) -> None:
    """Every kernel, copy, fill and operator is counted."""
    record = perf(
        "hpc_core.instruments.known:launching", kernels=37, copies=3, fills=2, steps=3, device="cuda", judge=False
    )
    # torch fills with zero by a kernel or by a memset.
    launched = record.metrics["kernels"].value + record.metrics["memsets"].value
    against("kernels", launched, _PROFILED * 39)
    seen = (launched, record.metrics["copies"].value, record.metrics["operators"].value)
    assert seen == (_PROFILED * 39, _PROFILED * 3, 42)
    assert record.metrics["synchronizations"].value == 0
    families = record.kernel_families
    assert sum(each.kernels for each in families.values()) == record.metrics["kernels"].value
    assert families["elementwise"].kernels >= _PROFILED * 37


def test_known_flops_are_counted_exactly(perf: Perf, against: Callable[[str, float, float], float]) -> None:
    """FLOPs are those of the products, each product is one kernel, and FLOPs over busy time is the GPU's measured rate."""
    times, edge = 10, 4096
    record = perf(
        "hpc_core.instruments.known:multiplying",
        rows=edge,
        inner=edge,
        columns=edge,
        times=times,
        steps=3,
        device="cuda",
        judge=False,
    )
    known = 2 * edge**3 * times
    against("flops", _value(record, "flops"), known)
    assert (record.metrics["flops"].value, record.metrics["kernels"].value) == (known, _PROFILED * times)
    sheet = gpu_of(record.circumstances.machine)
    if sheet is not None:
        rate = known / _value(record, "busy_s")
        assert rate < sheet.flop_per_s["bfloat16"], f"{rate / 1e12:.0f} TFLOP/s is more than {sheet.source} names"


_SHALLOW = ModelSpec(shape="llama-3.2-3b", layers=2)
_AUDITED = (
    finetune(_SHALLOW, lora(), prefix="audit-cost", variant="lora", batch=2, length=256, steps=3),
    generate(
        _SHALLOW,
        prefix="audit-cost",
        variant="generate-nf4",
        quantization=QuantSpec(kind="nf4", compute_dtype="bfloat16"),
        prompts=1,
        new_tokens=18,
    ),
)
_MOST_SHARE = 0.03


_FURTHER = tuple(msgspec.structs.replace(case, id=case.id.replace("audit-cost", "further")) for case in _AUDITED)
"""The same work under several ids, because a case may have only one test."""


@pytest.mark.parametrize("case", [pytest.param(case, id=case.kind) for case in _AUDITED])
def test_the_audit_changes_no_exact_number(case: Case, perf_session: PerfSession) -> None:
    """All metrics that are gated exactly are equal with and without the audit."""
    seen = [
        {
            name: metric.value
            for name, metric in perf_session.run(Job(case=case, kind=Measure(audit=audit))).metrics.items()
            if metric.noise == "exact" and metric.gated
        }
        for audit in (True, False)
    ]
    assert {"peak_bytes", "operators", "kernels"} <= set(seen[0])
    assert seen[0] == seen[1]


@pytest.mark.parametrize("case", [pytest.param(case, id=case.kind) for case in _FURTHER])
def test_a_further_process_counts_the_same_and_is_short(
    case: Case, perf_session: PerfSession, request: pytest.FixtureRequest
) -> None:
    """A repeat runs five steps, not ten: it has the full run's counts, a busy time within 1 %, and takes less time."""
    full, short = (perf_session.run(Job(case=case, kind=kind)) for kind in (Measure(), Retime()))
    both = merged(full, [short])
    assert both.status == "ok", both.reasons
    seconds = [process.seconds for process in both.processes]
    for name, (first, other) in busy_values(both).items():
        _note(request, f"seen.{name}", other / first - 1)
        assert abs(other / first - 1) < _WITHIN, f"{name} is {other:.6f} s, in the full process {first:.6f} s"
    _note(request, "seen.seconds", seconds)
    assert seconds[1] < seconds[0]


def test_the_canary_is_as_fast_as_the_ceilings(
    perf_session: PerfSession, against: Callable[[str, float, float], float]
) -> None:
    """The canary's product and copy are those of the ceilings, so both give the same rates within 10 %."""
    seen = perf_session.run(Job(case=_AUDITED[0], kind=MeasureCeilings(canary=True))).circumstances
    product = 2 * 8192**3 / seen.ceilings["matmul_bfloat16_flop_per_s"]
    copy = 2 * 2**31 / seen.ceilings["copy_bytes_per_s"]
    assert abs(against("canary.compute", seen.canary["compute"], product)) < 0.1
    assert abs(against("canary.memory", seen.canary["memory"], copy)) < 0.1


def test_the_audit_takes_less_than_three_percent(perf_session: PerfSession, request: pytest.FixtureRequest) -> None:
    """The audit's share of the seconds of all full-size cases of this session; skipped if `--case` selects none."""
    shares = {}
    for record in perf_session.records.values():
        phases = record.circumstances.phase_s
        if record.case.scale == "full" and "audit" in phases:
            shares[record.case.id] = phases["audit"] / sum(phases.values())
    if not shares:
        pytest.skip("no full-size case ran in this session before this test: run the whole bench/")
    worst = max(shares, key=lambda name: shares[name])
    _note(request, "seen.audit_share", shares[worst])
    assert shares[worst] < _MOST_SHARE, f"the audit takes {shares[worst]:.1%} of {worst}, allowed are {_MOST_SHARE:.0%}"
