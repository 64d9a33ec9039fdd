"""Wall time of steps, synchronized at both ends, without garbage collections in it."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator

import torch

from hpc_core.instruments.garbage import uncollected
from hpc_core.instruments.program import Program
from hpc_core.record.findings import Findings
from hpc_core.record.metrics import metric


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished everything queued; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def quiet(*, young: bool = False) -> Iterator[None]:
    """Collect garbage now and not while the block runs; `young` collects only what is recent, in a tenth of the time."""
    gc.collect(1 if young else 2)
    with uncollected():
        yield


def seconds_of(step: Callable[[], None], device: torch.device) -> float:
    """Seconds of one call, from an idle device to an idle device."""
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def wall_steps(program: Program, device: torch.device, steps: int) -> Findings:
    """Measure `step_s` over so many steps."""
    with quiet():
        samples = [seconds_of(program.step, device) for _ in range(steps)]
    return Findings(metrics={"step_s": metric("step_s", samples=samples)})
