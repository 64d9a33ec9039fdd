"""What the data path costs a fine-tuning case: the same steps fed and with every batch on the device, side by side in one process.

Steps are queued without an idle device between them. Before each fed pass the loader is emptied of what it made while nobody asked, so that a
pass shows how fast batches are made, not how many were in store.
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
"""Passes of each kind, in turn; their median counts."""
_MADE_ALONE = 40
"""Batches that the loader makes for nobody, to see how fast it could."""


_FREE = 0.02
"""Where waiting costs at most 2 % of a resident step, data bounds nothing."""
_WELL_SHARED = 0.5
"""Workers that give at least half of what so many lone makers would are bound by making, else by handing over."""


@dataclass(frozen=True)
class Rates:
    """Measured numbers of a feed; seconds are of a step or of a batch, which is the same."""

    feed: FeedSpec
    fed_s: float
    resident_s: float
    wait_s: float
    """Mean time that the host was busy getting a batch while it trained."""
    idle_s: float | None
    """In which the GPU had nothing to do meanwhile; None without one."""
    make_s: float
    """What one process needs for a batch."""
    supply_per_s: float
    """Batches a second from the same loader when nobody trains."""


def what_bounds(rates: Rates) -> str:
    """One sentence: what bounds the fed training, the rates of both sides, and what waiting cost."""
    feed = rates.feed
    many = feed.workers > 1
    who = f"{feed.workers} worker{'s make' if many else ' makes'}" if feed.workers else "the training process makes"
    alone = "themselves" if many else "itself"
    idle = "" if rates.idle_s is None else f", and the GPU idles {_time(rates.idle_s)} a step for it"
    cost = (
        f"{who} {rates.supply_per_s:.4g} batches/s by {alone}, training takes {1 / rates.resident_s:.4g}; the host waits {_time(rates.wait_s)} for "
        f"a batch{idle}; a step takes {_time(rates.fed_s)}, with resident batches {_time(rates.resident_s)}"
    )
    # Measured: idle kernels on a GPU; on a CPU, which is host and device, the wait itself.
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
    """The numbers of a program with a loader and of the same program with resident batches, per step. Idle times are None without a GPU."""

    fed_s: tuple[float, ...]
    """One a pass."""
    resident_s: tuple[float, ...]
    wait_s: tuple[float, ...]
    """One a batch: how long the host waited for it."""
    steps: int
    """Of a pass."""
    idle: Idle | None
    resident_idle: Idle | None
    rates: Rates

    @property
    def bound(self) -> str:
        """What bounds the fed program, in words with numbers."""
        return what_bounds(self.rates)


def measure_feed(place: Place, built: Built, program: FinetuneProgram, *, audit: bool) -> Findings:
    """Return metrics `feed_*`, the facts of the feed if it is audited, and a note that says what bounds it."""
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
    alone, unused = "one batch, made in the training process by itself", "made for nobody, by the same workers"
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
        "feed_idle_s": (cost.idle.within_s, f"a step: no kernel ran and the host was getting a batch; {queued}"),
        "feed_all_idle_s": (cost.idle.idle_s, "a step, for whatever reason"),
        "feed_resident_idle_s": (
            cost.resident_idle.idle_s,
            "a step of the same work with every batch on the device",
        ),
    }
    return metrics | {name: metric(name, total_s / steps, note=note) for name, (total_s, note) in idle.items()}


def feed_cost(program: FinetuneProgram, fed: Fed, resident: Resident, device: torch.device) -> FeedCost:
    """Run a program in turn on fed and on resident batches, and its loader alone.

    Raises:
        MeasureError: the profiler's reading is void.
    """
    fed_s, resident_s, waits = [], [], []
    steps = _GPU_STEPS if device.type == "cuda" else _CPU_STEPS
    for _ in range(_ROUNDS):
        first = _next_pass(fed)  # both on the same batches: ragged ones cost differently
        with _on(program, resident):
            resident_s.append(_pass_s(program, device, steps, first))
        fed_s.append(_pass_s(program, device, steps, first))
        waits += [(stop - start) / 1e9 for start, stop in fed.seen.fetched_ns[-steps:]]
    idle = resident_idle = None
    if device.type == "cuda":
        with _on(program, resident):
            resident_idle = idle_while(lambda: _seen_pass(program, device, steps, _next_pass(fed)), device)
        idle = idle_while(lambda: _seen_pass(program, device, steps, _next_pass(fed)), device)
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
    """In the block the program takes these batches in place of its own."""
    own, program.batches = program.batches, batches
    try:
        yield
    finally:
        program.batches = own


def _steps(program: FinetuneProgram, count: int, device: torch.device) -> None:
    """Steps in a row, the host never more than two ahead of the device: a longer queue would hide for long that batches come too slowly."""
    done: deque[torch.cuda.Event] = deque()
    for _ in range(count):
        if len(done) == _HOST_AHEAD:
            done.popleft().synchronize()
        program.step()
        if device.type == "cuda":
            done.append(torch.cuda.current_stream(device).record_event())


def _begin(program: FinetuneProgram, device: torch.device, first: int) -> None:
    """Take from a feed what lay in store, so that what follows is made while it is asked for, and get going at the batch of index `first`."""
    if isinstance(program.batches, Fed):
        program.batches.fetch_for_nobody(_in_store(program.batches))
    program.go_to(first)
    _steps(program, _HOST_AHEAD, device)


def _next_pass(fed: Fed) -> int:
    """Index of the batch that a pass begins with: the first one that the loader has not begun yet."""
    return (fed.next_index + _in_store(fed)) % len(fed)


def _in_store(fed: Fed) -> int:
    return fed.feed.workers * PREFETCHED


def _pass_s(program: FinetuneProgram, device: torch.device, steps: int, first: int) -> float:
    """Seconds a step, on the device's own clock where it has one, so that nothing waits at either end."""
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


def _seen_pass(program: FinetuneProgram, device: torch.device, steps: int, first: int) -> tuple[int, list[Window]]:
    """A pass to be looked at: since when, and when the host was busy getting batches in it."""
    _begin(program, device, first)
    since, fed = time.time_ns(), program.batches
    _steps(program, steps, device)
    windows = [*fed.seen.fetched_ns, *fed.seen.copied_ns] if isinstance(fed, Fed) else []
    return since, [window for window in windows if window[0] >= since]


def _make_s(fed: Fed) -> float:
    """Seconds to make one batch, in this process: median over the epoch's first ones."""
    seconds = []
    for index in range(_GPU_STEPS):
        began = time.perf_counter()
        host_batch(fed.source, index % len(fed))
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _supply_per_s(fed: Fed) -> float:
    """Batches a second that the loader gives when nobody trains."""
    fed.fetch_for_nobody(_in_store(fed))
    return _MADE_ALONE / fed.fetch_for_nobody(_MADE_ALONE)


def same_losses(program: FinetuneProgram, fed: Fed, resident: Resident, seed: int) -> Fact:
    """The loss of every batch by a fed step and by a resident one, at the same weights and the same random numbers: equal to the bit.

    Weights are put back before each step: two backward passes of one batch may differ in their last bits, two forward passes do not.
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
