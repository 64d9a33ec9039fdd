"""Measure what the data path costs a fine-tuning case: the same steps with fed and with resident batches, in one process.

Steps are queued without an idle device between them. Each fed pass first discards the batches that the loader has prefetched, so
that it shows how fast batches are made and not how many were ready.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hpc_core.audit.loader import feed_facts
from hpc_core.builders.assemble import Built
from hpc_core.builders.data.device_batches import Batches, Resident
from hpc_core.builders.data.loader import PREFETCHED, Fed, host_batch
from hpc_core.case.errors import MeasureError
from hpc_core.case.workloads import FeedSpec, FinetuneSpec
from hpc_core.engines.finetune import FinetuneProgram, resident_batches
from hpc_core.instruments.clock import quiet, seconds_of
from hpc_core.instruments.gaps import Idle, Window, idle_while
from hpc_core.instruments.program import copied
from hpc_core.record.findings import Findings
from hpc_core.record.metrics import metric
from hpc_core.record.record import Fact, Metric
from hpc_core.worker.place import Place

_GPU_STEPS, _CPU_STEPS = 20, 8
"""Steps of a pass."""
_HOST_AHEAD = 2
"""Steps that the host may be ahead of the device."""
_ROUNDS = 3
"""Passes of each kind, alternating; their median is reported."""
_MADE_ALONE = 40
"""Batches that the loader makes without training, to measure its maximum rate."""


_FREE = 0.02
"""Data is no bottleneck if waiting costs at most this share of a resident step."""
_WELL_SHARED = 0.5
"""Workers are limited by making batches if they reach this share of their ideal rate, else by handing batches over."""


@dataclass(frozen=True)
class Rates:
    """Measured rates of a feed; seconds are per step, and a step takes one batch."""

    feed: FeedSpec
    fed_s: float
    resident_s: float
    wait_s: float
    """Mean time that the host spent getting a batch during training."""
    idle_s: float | None
    """How much of that time the GPU was idle; None without a GPU."""
    make_s: float
    """Time that one process needs to make a batch."""
    supply_per_s: float
    """Batches per second from the same loader without training."""


def what_bounds(rates: Rates) -> str:
    """Return one sentence: what limits the fed training, the rates of both sides, and what waiting costs."""
    feed = rates.feed
    many = feed.workers > 1
    who = f"{feed.workers} worker{'s make' if many else ' makes'}" if feed.workers else "the training process makes"
    alone = "themselves" if many else "itself"
    idle = "" if rates.idle_s is None else f", and the GPU idles {_time(rates.idle_s)} a step for it"
    cost = (
        f"{who} {rates.supply_per_s:.4g} batches/s by {alone}, training takes {1 / rates.resident_s:.4g}; the host waits {_time(rates.wait_s)} for "
        f"a batch{idle}; a step takes {_time(rates.fed_s)}, with resident batches {_time(rates.resident_s)}"
    )
    # On a GPU, its measured idle time; a CPU is host and device, so the wait itself.
    lost = rates.wait_s if rates.idle_s is None else rates.idle_s
    if lost <= _FREE * rates.resident_s:
        return f"bound by nothing: {cost}"
    making = "tokenization" if feed.tokenize == "fetch" else "reading and collating"
    if rates.supply_per_s * rates.resident_s < 1:
        ideal = max(feed.workers, 1) / rates.make_s
        if feed.workers and rates.supply_per_s < _WELL_SHARED * ideal:
            return f"bound by handing batches over between processes, which by what one takes for a batch could be {ideal:.4g}/s: {cost}"
        return f"bound by {making}: {cost}"
    if not feed.workers:
        return f"bound by {making} in the training process, between its steps: {cost}"
    return f"bound by the way from the workers to the step (handing over, pinning, copying, shared cores): {cost}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


@dataclass(frozen=True)
class FeedCost:
    """Times of a program with a loader and with resident batches, per step. Idle times are None without a GPU."""

    fed_s: tuple[float, ...]
    """One per pass."""
    resident_s: tuple[float, ...]
    wait_s: tuple[float, ...]
    """One per batch: how long the host waited for it."""
    steps: int
    """Steps per pass."""
    idle: Idle | None
    resident_idle: Idle | None
    rates: Rates

    @property
    def bound(self) -> str:
        """Return what limits the fed program, as a sentence with numbers."""
        return what_bounds(self.rates)


def measure_feed(place: Place, built: Built, program: FinetuneProgram, *, audit: bool) -> Findings:
    """Return metrics `feed_*`, the facts of the feed if it is audited, and a note that says what limits it."""
    fed, workload, case_id = program.batches, place.case.workload, place.case.id
    assert isinstance(fed, Fed)
    assert isinstance(workload, FinetuneSpec)
    found = Findings(notes=(f"feed of {case_id}: {fed.note}",))
    resident, _ = resident_batches(built, workload)
    try:
        cost = feed_cost(program, fed, resident, place.device)
    except MeasureError as error:
        return found | Findings(reasons=(str(error),))
    if audit:
        apart = None if cost.idle is None else cost.idle.copies_apart
        found |= feed_facts(workload.feed, fed, on_gpu=place.on_gpu, copies_apart=apart)
        found |= Findings(facts={"feed_losses": same_losses(program, fed, resident, place.case.seed)})
    return found | Findings(metrics=_metrics(cost), notes=(f"feed of {case_id}: {cost.bound}",))


def _metrics(cost: FeedCost) -> dict[str, Metric]:
    rates, steps = cost.rates, cost.steps
    alone, unused = "one batch, made in the training process by itself", "made by the same workers without training"
    metrics = {
        "feed_step_s": metric("feed_step_s", samples=cost.fed_s),
        "feed_resident_step_s": metric("feed_resident_step_s", samples=cost.resident_s),
        "feed_wait_s": metric("feed_wait_s", samples=cost.wait_s),
        "feed_make_s": metric("feed_make_s", rates.make_s, note=alone),
        "feed_batches_per_s": metric("feed_batches_per_s", rates.supply_per_s, note=unused),
    }
    if cost.idle is None or cost.resident_idle is None:
        return metrics
    queued = f"{steps} steps in a row, the host at most {_HOST_AHEAD} ahead"
    idle = {
        "feed_idle_s": (cost.idle.within_s, f"per step: no kernel ran and the host was getting a batch; {queued}"),
        "feed_all_idle_s": (cost.idle.idle_s, "per step, for any reason"),
        "feed_resident_idle_s": (
            cost.resident_idle.idle_s,
            "per step of the same work with every batch on the device",
        ),
    }
    return metrics | {name: metric(name, total_s / steps, note=note) for name, (total_s, note) in idle.items()}


def feed_cost(program: FinetuneProgram, fed: Fed, resident: Resident, device: torch.device) -> FeedCost:
    """Run a program alternately on fed and on resident batches, and then its loader alone.

    Raises:
        MeasureError: the profiler's reading is incomplete.
    """
    fed_s, resident_s, waits = [], [], []
    steps = _GPU_STEPS if device.type == "cuda" else _CPU_STEPS
    for _ in range(_ROUNDS):
        first = _next_pass(fed)  # both on the same batches: ragged ones cost differently
        with _on(program, resident):
            resident_s.append(_pass_s(program, device, steps, first))
        fed_s.append(_pass_s(program, device, steps, first))
        waits += [(stop - start) / 1e9 for start, stop in fed.observed.fetched_ns[-steps:]]
    idle = resident_idle = None
    if device.type == "cuda":
        with _on(program, resident):
            resident_idle = idle_while(lambda: _recorded_pass(program, device, steps, _next_pass(fed)), device)
        idle = idle_while(lambda: _recorded_pass(program, device, steps, _next_pass(fed)), device)
    rates = Rates(
        feed=fed.feed,
        fed_s=statistics.median(fed_s),
        resident_s=statistics.median(resident_s),
        wait_s=statistics.fmean(waits),
        idle_s=None if idle is None else idle.within_s / steps,
        make_s=_make_s(fed),
        supply_per_s=_supply_per_s(fed),
    )
    return FeedCost(tuple(fed_s), tuple(resident_s), tuple(waits), steps, idle, resident_idle, rates)


@contextlib.contextmanager
def _on(program: FinetuneProgram, batches: Batches) -> Iterator[None]:
    """Let the program take these batches instead of its own in the block."""
    own, program.batches = program.batches, batches
    try:
        yield
    finally:
        program.batches = own


def _steps(program: FinetuneProgram, count: int, device: torch.device) -> None:
    """Run steps in a row with the host at most two ahead of the device: a longer queue would hide slow batches."""
    done: deque[torch.cuda.Event] = deque()
    for _ in range(count):
        if len(done) == _HOST_AHEAD:
            done.popleft().synchronize()
        program.step()
        if device.type == "cuda":
            done.append(torch.cuda.current_stream(device).record_event())


def _begin(program: FinetuneProgram, device: torch.device, first: int) -> None:
    """Discard the batches that a feed has prefetched, then start at the batch of index `first`."""
    if isinstance(program.batches, Fed):
        program.batches.discard(_prefetched(program.batches))
    program.go_to(first)
    _steps(program, _HOST_AHEAD, device)


def _next_pass(fed: Fed) -> int:
    """Return the index of the first batch that the loader has not begun, with which a pass begins."""
    return (fed.next_index + _prefetched(fed)) % len(fed)


def _prefetched(fed: Fed) -> int:
    return fed.feed.workers * PREFETCHED


def _pass_s(program: FinetuneProgram, device: torch.device, steps: int, first: int) -> float:
    """Return the seconds per step, by CUDA events on a GPU, so that neither end synchronizes."""
    with quiet(young=True):
        _begin(program, device, first)
        if device.type != "cuda":
            return seconds_of(lambda: _steps(program, steps, device), device) / steps
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        _steps(program, steps, device)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / steps


def _recorded_pass(program: FinetuneProgram, device: torch.device, steps: int, first: int) -> tuple[int, list[Window]]:
    """Run a pass; return its start, and the windows in which the host was getting batches."""
    _begin(program, device, first)
    since, fed = time.time_ns(), program.batches
    _steps(program, steps, device)
    windows = [*fed.observed.fetched_ns, *fed.observed.copied_ns] if isinstance(fed, Fed) else []
    return since, [window for window in windows if window[0] >= since]


def _make_s(fed: Fed) -> float:
    """Return the median seconds to make one batch in this process, over the first ones of the epoch."""
    seconds = []
    for index in range(_GPU_STEPS):
        began = time.perf_counter()
        host_batch(fed.source, index % len(fed))
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _supply_per_s(fed: Fed) -> float:
    """Return the batches per second that the loader makes without training."""
    fed.discard(_prefetched(fed))
    return _MADE_ALONE / fed.discard(_MADE_ALONE)


def same_losses(program: FinetuneProgram, fed: Fed, resident: Resident, seed: int) -> Fact:
    """Compare the loss of every batch, fed and resident, with the same weights and random numbers: they must be bitwise equal.

    Weights are restored before each step, because two backward passes of one batch may differ in their last bits. Two forward
    passes do not.
    """
    trained = [part for part in program.model.parameters() if part.requires_grad]
    before = [copied(part) for part in trained]
    found: dict[str, torch.Tensor] = {}
    for name, batches in (("resident", resident), ("fed", fed)):
        losses = []
        with _on(program, batches):
            program.go_to(0)
            for index in range(len(resident)):
                with torch.no_grad():
                    for part, value in zip(trained, before, strict=True):
                        part.copy_(value)
                torch.manual_seed(seed + index)
                program.step()
                assert program.loss is not None
                losses.append(program.loss.clone())
        found[name] = torch.stack(losses)
    equal = int((found["fed"] == found["resident"]).sum())
    asked = f"{len(resident)} of {len(resident)} equal those of resident batches"
    return Fact(asked=asked, seen=f"{equal}{asked[len(str(len(resident))) :]}")
