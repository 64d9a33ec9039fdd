"""Split the wall time of a decoded token or a step by what the host does: Python, operators, CUDA calls, waiting for the GPU.

The profiler records when an operator or a CUDA call runs on the host; the rest is Python. It inflates the host's time, and that of
operators most, so only the shares are taken from it. They are scaled to the median of the times that were taken without it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch

from hpc_core.instruments.clock import quiet, seconds_of, synchronize
from hpc_core.instruments.kernels import call_kind, one_cycle
from hpc_core.instruments.program import Program
from hpc_core.record.exceptions import message_of
from hpc_core.record.findings import Findings
from hpc_core.record.metrics import metric

Part = Literal["launch", "dispatch", "waiting", "python"]
WINDOW = "hpc-core: split"
"""The profiler range around the work that is split."""
_LONGEST_LAUNCH_NS = 30_000
"""A launch or copy is queued in about 5 µs. One that takes longer than this waits: for room in the queue, or for the device."""
_CUDA_CALL = re.compile(r"^cu(da)?[A-Z]")
_EVALUATES = "autograd::engine::evaluate_function: "
_NODE = re.compile(r"Backward\d+$")
"""Autograd's own nodes. Those of functions written in Python end in "Backward" without a number."""


class Window:
    """Mark the beginning and the end of the work that is split, on the thread that runs it."""

    def __init__(self) -> None:
        self._range: Any = None

    def begin(self) -> None:
        """Begin the window."""
        self._range = torch.profiler.record_function(WINDOW)
        self._range.__enter__()

    def end(self) -> None:
        """End the window."""
        self._range.__exit__(None, None, None)


def split_step(program: Program, device: torch.device, wall_s: float) -> Findings:
    """Return how a step's `wall_s` splits; the step runs twice."""

    def work(window: Window) -> None:
        seconds_of(program.step, device)  # the first step under the profiler prepares it
        window.begin()
        seconds_of(program.step, device)
        window.end()

    return split(work, device, wall_s)


def split(work: Callable[[Window], None], device: torch.device, wall_s: float) -> Findings:
    """Run `work`, which marks its window, under the profiler, and return how `wall_s` splits by what happens in the window.

    Args:
        work: is warm.
        device: a CPU has neither launches nor waiting.
        wall_s: median seconds of this work without the profiler.
    """
    on_gpu, kinds = device.type == "cuda", torch.profiler.ProfilerActivity
    try:
        with quiet(), one_cycle([kinds.CPU, *([kinds.CUDA] if on_gpu else [])]) as profiler:
            work(Window())
            synchronize(device)
        inner: Any = profiler.profiler
        found = parts(inner.kineto_results.events())
    # All that is gated has been measured by now and must not be lost: the code under test may use a profiler itself.
    except Exception as error:
        return Findings(notes=(f"wall time is not split: {type(error).__name__}: {message_of(error).splitlines()[0]}",))
    whole = sum(found.values())
    if not whole:
        return Findings(notes=("wall time is not split: the profiler did not record the work's range",))
    names: tuple[Part, ...] = ("python", "dispatch", *(("launch", "waiting") if on_gpu else ()))
    values = {f"{name}_s": wall_s * found.get(name, 0) / whole for name in names}
    return Findings(metrics={name: metric(name, value, on_gpu=on_gpu) for name, value in values.items()})


def parts(events: Iterable[Any]) -> Mapping[Part, int]:
    """Return the nanoseconds of each part within the windows, from the profiler's raw records.

    A moment belongs to the innermost of a thread's operators and CUDA calls. If threads do different things, a CUDA call comes before
    an operator, that before waiting, and Python is what remains: autograd's thread works while the one that called it waits.
    """
    cuda = torch._C._autograd.DeviceType.CUDA
    records = list(events)
    on_device = {each.correlation_id(): each.name() for each in records if each.device_type() == cuda}
    edges: list[tuple[int, int, str, int]] = []
    for each in records:
        what = None if each.device_type() == cuda else _what(each, on_device)
        if what is not None:
            thread = each.start_thread_id()
            edges += [(each.start_ns(), thread, what, 1), (each.end_ns(), thread, what, -1)]
    return _swept(sorted(edges))


def _what(event: Any, on_device: Mapping[int, str]) -> str | None:
    """Return launch, waiting, dispatch or window; None for what is Python, such as ranges and functions written in it."""
    name = event.name()
    if name == WINDOW:
        return "window"
    if event.is_user_annotation():
        return None
    if _CUDA_CALL.match(name):
        took = event.end_ns() - event.start_ns()
        return "waiting" if _waits(name, took, on_device.get(event.correlation_id(), "")) else "launch"
    node = name.removeprefix(_EVALUATES)
    return "dispatch" if "::" in node or _NODE.search(node) else None


def _waits(name: str, took_ns: int, on_device: str) -> bool:
    kind = call_kind(name)
    if kind == "copy" and ("Async" not in name or "-> Pageable" in on_device):
        return True  # a copy to memory that is not pinned ends when the device has done everything before it
    return kind == "wait" or (kind in ("launch", "copy", "fill") and took_ns > _LONGEST_LAUNCH_NS)


def _swept(edges: Iterable[tuple[int, int, str, int]]) -> Counter[Part]:
    """Return the nanoseconds of each part while a window is open. An edge is a moment, a thread, what begins or ends, and +1 or -1."""
    found = Counter[Part]()
    open_: dict[int, Counter[str]] = {}
    threads = Counter[str]()
    last, windows = 0, 0
    for moment, thread, what, step in edges:
        if windows and moment > last:
            found[_part(threads)] += moment - last
        last = moment
        if what == "window":
            windows += step
            continue
        own = open_.setdefault(thread, Counter())
        threads[_innermost(own)] -= 1
        own[what] += step
        threads[_innermost(own)] += 1
    return found


def _innermost(own: Counter[str]) -> str:
    """Return what a thread does; CUDA calls are called by operators."""
    return next((each for each in ("waiting", "launch", "dispatch") if own[each] > 0), "python")


def _part(threads: Counter[str]) -> Part:
    working: tuple[Part, ...] = ("launch", "dispatch", "waiting")
    return next((each for each in working if threads[each] > 0), "python")
