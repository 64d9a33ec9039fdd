"""The data path on a real GPU: copies on their own stream, pinned memory, and idle time."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hpc_core.builders.assemble import build
from hpc_core.builders.data.loader import Fed
from hpc_core.case.case import Case
from hpc_core.case.parts import DataSpec
from hpc_core.case.workloads import FinetuneSpec
from hpc_core.catalogue import finetune, lora, tiny
from hpc_core.engines.finetune import resident_batches
from hpc_core.engines.tuned.program import TunedProgram, training_program
from hpc_core.instruments.gaps import idle_while
from hpc_core.record.job import Job
from hpc_core.worker.feed import feed_cost, same_losses
from hpc_core.worker.perform import perform

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU to feed")]
_TIMEOUT_S = 240
"""For one test, its first compilations included."""
TEXTS = DataSpec(source="embedded", name="paragraphs")
GRAPH: dict[str, Any] = {"engine": "tuned", "loss": "chunked", "fusion": "blocks", "graph": True}


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def timeout() -> Iterator[None]:
    """A test that hangs (forked loaders, pinning threads, a capture) fails with a traceback."""

    def fail(*_: object) -> None:
        raise TimeoutError(f"The test did not end within {_TIMEOUT_S} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(_TIMEOUT_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def _case(switches: dict[str, Any], **feed: Any) -> Case:
    method = lora(dropout=0.0, dtype="bfloat16")
    case = finetune(
        tiny, method, batch=2, length=64, packing=True, data=TEXTS, steps=12, learning_rate=1e-3, **switches
    )
    return case.vary("lora-fed", way="loader", **feed)


@pytest.mark.parametrize(
    "feed",
    [
        {"workers": 0, "pinned": True, "ahead": 2},
        {"workers": 2, "pinned": True, "ahead": 3},
        {"workers": 2, "pinned": True, "ahead": 0},
        {"workers": 2, "pinned": False, "ahead": 2},
        {"workers": 2, "pinned": True, "ahead": 1, "tokenize": "fetch"},
    ],
    ids=lambda feed: "-".join(f"{name}{value}" for name, value in feed.items()),
)
@pytest.mark.parametrize("switches", [{}, GRAPH], ids=["stock", "captured"])
def test_fed_steps_equal_resident_ones(switches: dict[str, Any], feed: dict[str, Any], device: torch.device) -> None:
    """Every fed batch's loss equals the resident batch's bit for bit, in a captured step too."""
    case = _case(switches, **feed)
    assert isinstance(case.workload, FinetuneSpec)
    built = build(case, device)
    program = training_program(built, case, case.workload)
    for _ in range(program.first_steps + 2):
        program.step()
    if isinstance(program, TunedProgram):
        assert (program.captured is not None, program.fallen) == (True, {})
    fed = program.batches
    assert isinstance(fed, Fed)
    resident, _ = resident_batches(built, case.workload)
    for _ in range(3):  # a race need not show at once
        fact = same_losses(program, fed, resident, seed=0)
        assert fact.holds, fact
    assert fed.observed.pinned == {feed["pinned"]}
    assert fed.observed.ahead == {feed["ahead"]}
    program.release()


def test_a_buffer_is_not_overwritten_while_a_slow_step_reads_it(device: torch.device) -> None:
    """Steps that first wait 10 ms on the device still read their own batch, although the host is many steps ahead."""
    case = _case({}, workers=0, pinned=True, ahead=2)
    assert isinstance(case.workload, FinetuneSpec)
    built = build(case, device)
    fed = training_program(built, case, case.workload).batches
    resident, _ = resident_batches(built, case.workload)
    wrong = torch.zeros((), dtype=torch.long, device=device)
    for index in range(3 * len(resident)):
        batch = fed.take(index)
        torch.cuda._sleep(20_000_000)
        wrong += (batch.ids != resident.take(index).ids).sum()
        fed.taken()
    assert int(wrong) == 0
    fed.clear()


def test_idle_time_of_a_slow_host_is_measured(device: torch.device) -> None:
    """If the host sleeps ten times for 3 ms between short kernels, 30 ms of GPU idle time are found."""
    ones = torch.ones(1024, device=device)

    def work() -> tuple[int, list[tuple[int, int]]]:
        since, windows = time.time_ns(), []
        for _ in range(10):
            ones.add_(0)
            start = time.time_ns()
            time.sleep(0.003)
            windows.append((start, time.time_ns()))
        ones.add_(0)
        return since, windows

    idle = idle_while(work, device)
    slept = 0.030
    assert slept * 0.9 < idle.within_s <= idle.idle_s
    assert idle.within_s < slept * 1.5  # a sleep may last longer than asked


def test_a_starved_gpu_is_bound_by_what_starves_it(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loader that takes 20 ms per batch makes the GPU idle about as long, and the note says that reading is the bottleneck."""
    from hpc_core.builders.data import loader

    host_batch = loader.host_batch

    def slow(source: Any, index: int) -> Any:
        time.sleep(0.02)
        return host_batch(source, index)

    monkeypatch.setattr(loader, "host_batch", slow)
    case = _case(GRAPH, workers=0, pinned=True, ahead=2)
    assert isinstance(case.workload, FinetuneSpec)
    built = build(case, device)
    program = training_program(built, case, case.workload)
    for _ in range(program.first_steps + 2):
        program.step()
    fed = program.batches
    assert isinstance(fed, Fed)
    cost = feed_cost(program, fed, resident_batches(built, case.workload)[0], device)
    assert cost.rates.idle_s is not None
    assert 0.01 < cost.rates.idle_s < 0.03
    assert cost.bound.startswith("bound by reading and collating")
    program.release()


def test_the_record_of_a_fed_case_is_sound(device: torch.device) -> None:
    """With two workers, pinned memory and two batches ahead, every fact holds and copies run on their own stream."""
    case = _case(GRAPH, workers=2, pinned=True, ahead=2)
    record = perform(Job(case=case, launched="inline", device="cuda"), lambda _: None)
    assert record.status == "ok", record.reasons
    assert record.audit["feed_copies"].seen == "a stream of their own"
    assert record.audit["feed_losses"].seen == "12 of 12 equal those of resident batches"
    assert record.metrics["synchronizations"].value == 0
    assert record.metrics["feed_idle_s"].value >= 0
    assert any(": bound by" in note for note in record.circumstances.notes)
