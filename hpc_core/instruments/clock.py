"""Measure wall time: warm up, then time each step from an idle device to an idle device, without garbage collection."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator

import torch

from hpc_core.instruments.garbage import uncollected
from hpc_core.instruments.owners import Bystanders
from hpc_core.instruments.program import Program
from hpc_core.record.findings import Findings
from hpc_core.record.metrics import metric


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished everything queued; on a CPU, do nothing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def quiet(*, young: bool = False) -> Iterator[None]:
    """Collect garbage now and not while the block runs; `young` collects only recent objects, in a tenth of the time."""
    gc.collect(1 if young else 2)
    with uncollected():
        yield


def seconds_of(step: Callable[[], None], device: torch.device) -> float:
    """Return the seconds of one call, from an idle device to an idle device."""
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


_MOST_STEPS = 8
_MOST_PERIOD = 12
"""Warm-up runs at most this much of a period; further steps have new widths but no new kernels."""
_SETTLED_RATIO = 1.25
"""A step is warm if it takes less than this times the fastest step so far."""


def warm_up(
    program: Program,
    device: torch.device,
    began: float,
    *,
    first_steps: int = 0,
    after_step: Callable[[], None] | None = None,
) -> Findings:
    """Run until memory and time are stable: two equal peaks in a row, and a step about as fast as the fastest.

    If shapes change from step to step, a whole period runs instead. On a CPU, `observed["bystanders"]` holds the storages
    that were alive before.

    Args:
        program: what to warm up.
        device: where it runs.
        began: when this process began, by `time.perf_counter`.
        first_steps: steps that compile, tune or capture. They come before the warm-up, and their time is `first_use_s`.
        after_step: called after every step.
    """
    on_gpu = device.type == "cuda"
    observed = {} if on_gpu else {"bystanders": Bystanders(device)}
    metrics, seconds, peaks = {}, list[float](), list[int]()
    least = first_steps + min(max(2, program.period), _MOST_PERIOD)
    while len(seconds) < least + _MOST_STEPS:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        seconds.append(seconds_of(program.step, device))
        peaks.append(torch.cuda.max_memory_allocated(device) if on_gpu else 0)
        if len(seconds) == 1:
            note = "from the worker's start to its first finished step"
            metrics["cold_start_s"] = metric("cold_start_s", time.perf_counter() - began, note=note)
        if len(seconds) == first_steps:
            note = f"{first_steps} steps that compile, tune and capture"
            metrics["first_use_s"] = metric("first_use_s", sum(seconds), note=note)
        if after_step is not None:
            after_step()
        # Steps of different widths have different peaks and times, so one whole period is enough for them.
        alike = len(set(peaks[-2:])) == 1 and seconds[-1] < _SETTLED_RATIO * min(seconds)
        if len(seconds) >= least and (alike or program.period > 1):
            return Findings(metrics=metrics, observed=observed)
    last = f"peaks {sorted(set(peaks[-3:]))}, last steps {seconds[-3:]} s"
    note = f"warm-up did not settle in {len(seconds)} steps: {last}"
    return Findings(metrics=metrics, notes=(note,), observed=observed)
