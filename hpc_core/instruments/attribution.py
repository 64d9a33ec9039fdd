"""Attribute memory, operators and kernels of one step to the modules of the model.

Runs after everything that is gated, in separate passes. On a GPU, every operator is a named range on the host, and every launch
is inside one. The ranges cost host time, so this pass measures neither wall time nor gaps. Kernels run as long as without them.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hpc_core.instruments.allocations import StorageWatch
from hpc_core.instruments.clock import quiet, synchronize
from hpc_core.instruments.counters import without_compiling
from hpc_core.instruments.kernels import family, is_wait, one_cycle
from hpc_core.instruments.living import claiming
from hpc_core.instruments.memory import claim_before
from hpc_core.instruments.owners import Bystanders, by_module, optimizer_tensors, weight_tensors
from hpc_core.instruments.places import Places, following
from hpc_core.instruments.program import Mark, Program
from hpc_core.instruments.timeline import Timeline
from hpc_core.record.exceptions import message_of
from hpc_core.record.findings import Findings
from hpc_core.record.profile import KernelUse, OperatorUse, Profile

_PREFIX = "hpc-core"
_SEPARATOR = "|"
_LONGEST = 160
"""Characters kept of a kernel's name; the template arguments beyond that do not distinguish the kernels of one operator."""


@dataclass(frozen=True)
class Range:
    """One operator on the host, with its start and end in nanoseconds."""

    thread: int
    start_ns: int
    end_ns: int
    module: str
    operator: str


@dataclass(frozen=True)
class DeviceWork:
    """A kernel, copy or memset, and the host's call that launched it (None if the profiler lost that call)."""

    name: str
    seconds: float
    launched: tuple[int, int] | None
    """Thread and nanoseconds."""


class NamedRanges(TorchDispatchMode):
    """Run each operator inside a profiler range that names the module."""

    def __init__(self, place: Callable[[], str]):
        super().__init__()
        self._place = place

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator inside its range."""
        with torch.profiler.record_function(_SEPARATOR.join((_PREFIX, self._place(), str(func)))):
            return func(*args, **(kwargs or {}))


def kernel_uses(work: Callable[[], None], device: torch.device, place: Callable[[], str]) -> tuple[KernelUse, ...]:
    """Run `work` once under the profiler and return the device's work by module; `place` returns the running module's path."""
    synchronize(device)
    kinds = torch.profiler.ProfilerActivity
    with quiet(), one_cycle([kinds.CPU, kinds.CUDA]) as profiler:
        with without_compiling(), NamedRanges(place):
            work()
        synchronize(device)
    inner: Any = profiler.profiler
    return attributed(*ranges_and_work(inner.kineto_results.events()))


def ranges_and_work(events: Iterable[Any]) -> tuple[list[Range], list[DeviceWork]]:
    """Return the operators' ranges and the device's work from the profiler's raw records."""
    cuda = torch._C._autograd.DeviceType.CUDA
    ranges: list[Range] = []
    launches: dict[int, tuple[int, int]] = {}
    on_device = []
    for event in events:
        name = event.name()
        if event.device_type() == cuda:
            if not _is_idle(event, name):
                on_device.append(event)
        elif name.startswith(_PREFIX + _SEPARATOR):
            _, module, operator = name.split(_SEPARATOR, 2)
            ranges.append(Range(event.start_thread_id(), event.start_ns(), event.end_ns(), module, operator))
        elif name.startswith("cu"):
            launches[event.correlation_id()] = (event.start_thread_id(), event.start_ns())
    work = [
        DeviceWork(event.name(), (event.end_ns() - event.start_ns()) / 1e9, launches.get(event.correlation_id()))
        for event in on_device
    ]
    return ranges, work


def _is_idle(event: Any, name: str) -> bool:
    return bool(event.is_user_annotation()) or is_wait(name) or name.startswith(_PREFIX + _SEPARATOR)


def attributed(ranges: Iterable[Range], work: Iterable[DeviceWork]) -> tuple[KernelUse, ...]:
    """Sum launches and seconds by module, operator and kernel, the most seconds first; work outside all ranges has no module."""
    by_thread: dict[int, list[Range]] = {}
    for each in sorted(ranges, key=lambda one: one.start_ns):
        by_thread.setdefault(each.thread, []).append(each)
    starts = {thread: [each.start_ns for each in found] for thread, found in by_thread.items()}
    totals: dict[tuple[str, str, str], tuple[int, float]] = {}
    for done in work:
        at = _around(done.launched, by_thread, starts)
        key = ("", "", _short(done.name)) if at is None else (at.module, at.operator, _short(done.name))
        launches, seconds = totals.get(key, (0, 0.0))
        totals[key] = (launches + 1, seconds + done.seconds)
    most = sorted(totals.items(), key=lambda each: (-each[1][1], each[0]))
    return tuple(KernelUse(*key, _family(key[2]), launches, seconds) for key, (launches, seconds) in most)


def _around(
    launched: tuple[int, int] | None, by_thread: dict[int, list[Range]], starts: dict[int, list[int]]
) -> Range | None:
    if launched is None or launched[0] not in by_thread:
        return None
    thread, moment = launched
    index = bisect_right(starts[thread], moment) - 1
    found = by_thread[thread][index] if index >= 0 else None
    return found if found is not None and moment <= found.end_ns else None


def _short(name: str) -> str:
    return name.removeprefix("void ").replace("at::native::", "")[:_LONGEST]


def _family(name: str) -> str:
    if name.startswith("Memcpy"):
        return "memcpy"
    return "memset" if name.startswith("Memset") else family(name)


class Owning(Protocol):
    """A recorder that takes the owners of tensors."""

    def own(self, category: str, tensors: Iterable[torch.Tensor]) -> None:
        """Assign these tensors to a category."""

    def name(self, module: str, tensors: Iterable[torch.Tensor]) -> None:
        """Assign these tensors to a module."""

    def __call__(self, phase: str) -> None:
        """Begin a phase."""


def profile_step(
    program: Program,
    device: torch.device,
    work: str,
    *,
    model: torch.nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    marking: Callable[[Owning], Mark] | None = None,
    bystanders: Bystanders | None = None,
    search: bool = False,
) -> Findings:
    """Attribute one step of `program`, or return a note that says why not. `work` describes the step.

    `marking` may wrap the recorder to assign short-lived tensors. `search` finds the owners among what lives in this process.
    """
    try:
        with following() as places:
            profile = _attributed_step(
                program, device, work, places, model, optimizer, marking, bystanders, search=search
            )
    # Everything that is gated has been measured by now and must not be lost, whatever the code under test raises here.
    except Exception as error:
        message = message_of(error).splitlines()[0]
        return Findings(notes=(f"no profile: {type(error).__name__}: {message}",))
    return Findings(profile=profile)


def _attributed_step(
    program: Program,
    device: torch.device,
    work: str,
    places: Places,
    model: torch.nn.Module | None,
    optimizer: torch.optim.Optimizer | None,
    marking: Callable[[Owning], Mark] | None,
    bystanders: Bystanders | None,
    *,
    search: bool,
) -> Profile:
    if model is not None:
        places.learn(model)
    owners = weight_tensors(model) if model is not None else {}
    if optimizer is not None:
        owners["optimizer"] = optimizer_tensors(optimizer)
    watch = StorageWatch(program.phases)
    watch.place = places.here
    mark: Mark = watch if marking is None else marking(watch)
    with quiet(young=True):
        claim_before(device, watch, owners, bystanders)
        for module, tensors in by_module(model, optimizer):
            watch.name(module, tensors)
        places.begin()
        with watch, claiming(watch.claim, watch.name, places) if search else contextlib.nullcontext():
            program.step(mark)
        synchronize(device)
        found = profile_of(work, program.phases, watch.timeline, watch.uses, places)
    if device.type != "cuda":
        return found
    return msgspec.structs.replace(found, kernels=kernel_uses(program.step, device, places.here))


def profile_of(
    work: str,
    phases: Iterable[str],
    timeline: Timeline,
    uses: Mapping[tuple[str, str, str], int],
    places: Places,
) -> Profile:
    """Return the profile from a recorder's timeline and counts."""
    names = tuple(phases)
    most = sorted(uses.items(), key=lambda each: (-each[1], each[0]))
    return Profile(
        work=work,
        phases=names,
        modules=places.modules(),
        at_peak=timeline.pieces_at_peak(names),
        operators=tuple(OperatorUse(*key, times) for key, times in most),
    )
