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

from hpc_core.audit import feed_facts
from hpc_core.builders import Built
from hpc_core.builders.data.device_batches import Batches, Resident
from hpc_core.builders.data.loader import PREFETCHED, Fed, host_batch
from hpc_core.case.case import FinetuneSpec
from hpc_core.case.errors import MeasureError
from hpc_core.engines.finetune import FinetuneProgram, resident_batches
from hpc_core.instruments.clock import quiet, seconds_of
from hpc_core.instruments.gaps import Idle, Window, idle_while
from hpc_core.record.record import Fact
from hpc_core.worker.feed_words import Rates, what_bounds
from hpc_core.worker.kept import kept
from hpc_core.worker.metrics import reported, wall
from hpc_core.worker.session import Session

__all__ = ["FeedCost", "feed_cost", "measure_feed", "same_losses"]

_GPU_STEPS, _CPU_STEPS = 20, 8
"""Steps of a pass."""
_HOST_AHEAD = 2
"""Steps that the host may be ahead of the device."""
_ROUNDS = 3
"""Passes of each kind, in turn; their median counts."""
_MADE_ALONE = 40
"""Batches that the loader makes for nobody, to see how fast it could."""


@dataclass(frozen=True)
class FeedCost:
    """The numbers of a fed program beside its resident twin, a step each; idle times are None without a GPU."""

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


def measure_feed(session: Session, built: Built, program: FinetuneProgram, workload: FinetuneSpec) -> None:
    """Metrics `feed_*`, the audit's facts of the feed, and a note that says what bounds it; nothing where batches are resident."""
    fed = program.batches
    if not isinstance(fed, Fed):
        return
    session.phase("feed")
    session.notes.append(f"feed of {session.case.id}: {fed.note}")
    resident, _ = resident_batches(built, workload)
    try:
        cost = feed_cost(program, fed, resident, session.device)
    except MeasureError as error:
        session.reasons.append(str(error))
        return
    if session.options.audit:
        apart = None if cost.idle is None else cost.idle.copies_apart
        session.audit |= feed_facts(workload.feed, fed, on_gpu=session.on_gpu, copies_apart=apart)
        session.audit["feed_losses"] = same_losses(program, fed, resident, session.case.seed)
    _note(session, cost)


def _note(session: Session, cost: FeedCost) -> None:
    metrics, rates = session.metrics, cost.rates
    queued = f"{cost.steps} steps in a row, the host at most {_HOST_AHEAD} ahead"
    metrics["feed_step_s"] = wall(cost.fed_s)
    metrics["feed_resident_step_s"] = wall(cost.resident_s)
    metrics["feed_wait_s"] = wall(cost.wait_s)
    metrics["feed_make_s"] = reported(rates.make_s, "s", note="one batch, made in the training process by itself")
    metrics["feed_batches_per_s"] = reported(
        rates.supply_per_s, "batches/s", better="higher", note="made for nobody, by the same workers"
    )
    if cost.idle is not None and cost.resident_idle is not None:
        metrics["feed_idle_s"] = reported(
            cost.idle.within_s / cost.steps,
            "s",
            note=f"a step: no kernel ran and the host was getting a batch; {queued}",
        )
        metrics["feed_all_idle_s"] = reported(cost.idle.idle_s / cost.steps, "s", note="a step, for whatever reason")
        metrics["feed_resident_idle_s"] = reported(
            cost.resident_idle.idle_s / cost.steps, "s", note="a step of the same work with every batch on the device"
        )
    session.notes.append(f"feed of {session.case.id}: {cost.bound}")


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
    before = [kept(part) for part in trained]
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
