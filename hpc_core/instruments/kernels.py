"""Measure the device's work in steps: GPU-busy time, kernels by family, launches, and the host's calls of the CUDA runtime.

Busy time is the union of the intervals in which a kernel, copy or memset ran, according to the profiler. It records device
activity only: no operators, annotations or synchronization events. The profiler can drop early records without an error, so a
reading is valid only if it has sentinel kernels at both ends and a kernel for every launch.
"""

from __future__ import annotations

import contextlib
import functools
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import torch

from hpc_core.case.errors import MeasureError
from hpc_core.instruments.clock import quiet, synchronize
from hpc_core.instruments.program import Program
from hpc_core.instruments.sm_clock import ClockWatch, clock_metric
from hpc_core.record.environment import gpu_state
from hpc_core.record.findings import Findings
from hpc_core.record.metrics import metric
from hpc_core.record.record import KernelFamily

_RULES = (
    # The first match decides. Names may match several families: a 4-bit product dequantizes too.
    ("optimizer", r"multi_tensor_apply|[Oo]ptimizer|Adam|\bsgd|lion_"),
    ("attention", r"sdpa|fmha|flash|[Aa]ttention"),
    ("gemm", r"gemm|nvjet|cutlass|gemv|splitKreduce|\bscal_kernel|wgmma|triton_tem_|_mm_kernel|tinygemm"),
    ("quantization", r"[Qq]uant"),
    ("copy", r"copy_kernel|CatArray|[Cc]opy_?[Bb]atched|copy_device_to_device"),
    ("norm", r"layer_?norm|rms_?norm|GammaBeta|batch_?norm|group_?norm", re.IGNORECASE),
    ("softmax", r"softmax|nll_loss|cross_entropy", re.IGNORECASE),
    (
        "indexing",
        r"index|gather|scatter|embedding|compute_grad_weight|radix_?sort|krn_partial|write_num_of_segments",
        re.I,
    ),
    ("reduction", r"reduce|scan|triton_(red|per)_|\bdot_kernel|ReduceOp"),
    ("elementwise", r"elementwise|pointwise|dropout|distribution|fill|triton_poi_|arange", re.IGNORECASE),
)
_PATTERNS = tuple((name, re.compile(pattern, *flags)) for name, pattern, *flags in _RULES)
FAMILIES = (*(name for name, _ in _PATTERNS), "other")
"""All families, in the order in which names are matched."""


def family(kernel: str) -> str:
    """Return the family of a kernel by its name in the profiler; "other" if no rule matches."""
    return next((name for name, pattern in _PATTERNS if pattern.search(kernel)), "other")


def families_of(seconds: Mapping[str, float], counts: Mapping[str, int]) -> dict[str, tuple[float, int]]:
    """Sum seconds and launches of kernels by family, the family with the most seconds first."""
    total: defaultdict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for name, value in seconds.items():
        key = family(name)
        before = total[key]
        total[key] = (before[0] + value, before[1] + counts[name])
    return dict(sorted(total.items(), key=lambda item: -item[1][0]))


MARK = "cudaStreamQuery"
"""Queries whether a stream is idle. The call does not synchronize, and torch does not use it in a step."""
MARKS = 3
"""This many in a row end a step; one or two may be the case's own."""
_KINDS = (
    ("launch", re.compile(r"Launch(Cooperative)?Kernel")),
    ("graph", re.compile(r"GraphLaunch")),
    ("wait", re.compile(r"^cu(da)?(Device|Ctx|Stream|Event)Synchronize")),
    ("copy", re.compile(r"^cu(da)?Memcpy")),
    ("fill", re.compile(r"^cu(da)?Memset")),
    ("allocation", re.compile(r"^cu(da)?(Mem(Alloc|Create)|Malloc)")),
    ("free", re.compile(r"^cu(da)?(Mem)?(Free|Release)")),
    ("mark", re.compile(MARK)),
    ("capture", re.compile(r"StreamBeginCapture")),
    ("captured", re.compile(r"StreamEndCapture")),
)


@dataclass(frozen=True)
class HostCall:
    """One call of the CUDA runtime or driver."""

    name: str
    correlation: int
    """A runtime call and the driver call that it makes have the same number."""
    start_ns: int


@functools.cache
def call_kind(name: str) -> str | None:
    """Return launch, graph, wait, copy, fill, allocation, free, mark, capture or captured; None for other calls."""
    return next((kind for kind, pattern in _KINDS if pattern.search(name)), None)


def kinds(calls: Iterable[HostCall]) -> list[str]:
    """Return launch, graph, wait, copy, fill, allocation, free or mark for each such call, in the host's order, each call once.

    Calls during the capture of a CUDA graph run nothing and are left out: torch.compile captures again for a new cache.
    """
    counted: set[tuple[str, int]] = set()
    ordered = []
    capturing = False
    for call in sorted(calls, key=lambda one: one.start_ns):
        kind = call_kind(call.name)
        if kind in ("capture", "captured"):
            capturing = kind == "capture"
        elif kind is not None and not capturing and (kind, call.correlation) not in counted:
            counted.add((kind, call.correlation))
            ordered.append(kind)
    return ordered


def made_between(ordered: Sequence[str]) -> list[str]:
    """Return the calls between the launches of the two sentinels, without our wait for the first sentinel."""
    ends = [at for at, kind in enumerate(ordered) if kind == "launch"]
    inner = list(ordered[ends[0] + 1 : ends[-1]]) if len(ends) > 1 else []
    if "wait" in inner:
        inner.remove("wait")  # the first one: we wait for the sentinel before the work begins
    return inner


def steps_alike(between: Sequence[str], steps: int) -> bool:
    """Return whether there are `steps` marked steps, all with equal numbers of launches, copies, fills and waits."""
    counts: list[Counter[str]] = [Counter()]
    marks = 0
    for kind in between:
        marks = marks + 1 if kind == "mark" else 0
        if marks == MARKS:
            counts.append(Counter())
            marks = 0
        elif kind != "mark":
            counts[-1][kind] += 1
    *whole, rest = counts
    return len(whole) == steps and not rest and all(each == whole[0] for each in whole)


def one_cycle(activities: Sequence[torch.profiler.ProfilerActivity], **options: Any) -> torch.profiler.profile:
    """Return a profiler that records from its start to its stop; `options` are torch.profiler.profile's.

    Without acc_events, torch (2.11) warns that it keeps only one cycle, which is all that we need. With acc_events, it builds an
    event tree, and ten steps of five thousand kernels take seven seconds longer.
    """
    warnings.filterwarnings("ignore", message="Warning: Profiler clears events")
    return torch.profiler.profile(activities=activities, **options)


_SENTINEL = "spin_kernel"
"""The kernel behind torch.cuda._sleep."""
_SENTINEL_CYCLES = 20_000
_TRIES = 3


@dataclass(frozen=True)
class Interval:
    """One device record: what ran, on which stream, with its start and end in nanoseconds."""

    name: str
    kind: str
    """kernel, copy or memset."""
    stream: int
    start_ns: int
    end_ns: int
    graph: int = 0
    """Correlation number of the CUDA graph's launch that this was part of; 0 if it was launched separately."""


@dataclass(frozen=True)
class DeviceActivity:
    """What the device did; every field is a total over all steps."""

    busy_s: float
    stream_s: dict[int, float]
    """Busy seconds by stream; they add up to more than busy_s if streams overlap."""
    kernels: int
    copies: int
    memsets: int
    kernel_s: dict[str, float]
    """Seconds by kernel name."""
    kernel_counts: dict[str, int]
    launches: int = 0
    """How often the host launched a kernel or a CUDA graph."""
    synchronizations: int = 0
    """How often the host waited for a stream, an event or the whole device."""
    device_allocations: int = 0
    """How often the host asked the driver for memory, not torch's allocator."""
    device_frees: int = 0
    steps_alike: bool = False
    """True if all steps that `mark_step` ended have equal numbers of launches, copies, fills and waits."""


def mark_step(device: torch.device) -> None:
    """Mark the end of a step in the profile, without synchronizing and without work for the device."""
    stream = torch.cuda.current_stream(device)
    for _ in range(MARKS):
        stream.query()


def device_activity(
    work: Callable[[], None],
    device: torch.device,
    *,
    marked_steps: int = 0,
    watch: contextlib.AbstractContextManager[object] | None = None,
) -> DeviceActivity:
    """Run `work` under the profiler and return what the device did.

    Args:
        work: what to run; it marks the end of `marked_steps` steps.
        device: a GPU.
        marked_steps: as above.
        watch: is entered when the work begins and left when the device has finished it, once for each reading.

    Raises:
        MeasureError: three times in a row the reading was incomplete.
    """
    problem = ""
    for _ in range(_TRIES):
        intervals, calls = sorted_events(recorded(work, device, watch))
        ordered = kinds(calls)
        try:
            activity = summarize(intervals, ordered.count("launch"), ordered.count("graph"))
        except MeasureError as error:
            problem = str(error)
            continue
        between = made_between(ordered)
        alike = marked_steps > 0 and steps_alike(between, marked_steps)
        made = Counter(between)
        return replace(
            activity,
            launches=made["launch"] + made["graph"],
            synchronizations=made["wait"],
            device_allocations=made["allocation"],
            device_frees=made["free"],
            steps_alike=alike,
        )
    raise MeasureError(f"{problem} Tried {_TRIES} times; busy time and kernel counts of this run are void.")


def recorded(
    work: Callable[[], None], device: torch.device, watch: contextlib.AbstractContextManager[object] | None = None
) -> list[Any]:
    """Run `work` under the profiler between two sentinel kernels, and return the raw records; `watch` is entered meanwhile."""
    synchronize(device)
    with quiet(), one_cycle([torch.profiler.ProfilerActivity.CUDA]) as profiler:
        torch.cuda._sleep(_SENTINEL_CYCLES)
        synchronize(device)
        with watch or contextlib.nullcontext():
            work()
            torch.cuda._sleep(_SENTINEL_CYCLES)
            synchronize(device)
    # Raw records: building torch's event tree for fifty thousand kernels would take longer than the case.
    inner: Any = profiler.profiler
    return list(inner.kineto_results.events())


def sorted_events(events: Iterable[Any]) -> tuple[list[Interval], list[HostCall]]:
    """Return device records as intervals, and the host's calls of the CUDA runtime."""
    intervals: list[Interval] = []
    calls: list[HostCall] = []
    of_call: list[int] = []
    cuda = torch._C._autograd.DeviceType.CUDA
    for event in events:
        name = event.name()
        if event.device_type() == cuda:
            kind = _kind(event, name)
            if kind is not None:
                intervals.append(Interval(name, kind, event.device_resource_id(), event.start_ns(), event.end_ns()))
                of_call.append(event.correlation_id())
        elif name.startswith("cu"):
            calls.append(HostCall(name, event.correlation_id(), event.start_ns()))
    graphs = {call.correlation for call in calls if call_kind(call.name) == "graph"}
    marked = [
        replace(interval, graph=number) if number in graphs else interval
        for interval, number in zip(intervals, of_call, strict=True)
    ]
    return marked, calls


def _kind(event: Any, name: str) -> str | None:
    if event.is_user_annotation() or is_wait(name):
        return None
    if name.startswith("Memcpy"):
        return "copy"
    return "memset" if name.startswith("Memset") else "kernel"


def is_wait(name: str) -> bool:
    """Return whether the profiler's record of this name is a wait or an event on the device: it takes time but does no work."""
    return name.endswith(" Sync") or name.startswith(("Stream Wait", "Event Record"))


def summarize(intervals: list[Interval], launches: int, graphs: int = 0) -> DeviceActivity:
    """Return the totals between the sentinels, without the sentinels; `graphs` is how many CUDA graphs were launched.

    Raises:
        MeasureError: a sentinel is missing, or launches and kernels differ in number, or a graph has no kernel.
    """
    ordered = sorted(intervals, key=lambda interval: interval.start_ns)
    ends = [interval for interval in (*ordered[:1], *ordered[1:][-1:]) if _SENTINEL in interval.name]
    kernels = [interval for interval in ordered if interval.kind == "kernel"]
    if len(ends) != 2:
        raise MeasureError(
            f"Of {len(ordered):,} device records {len(ends)} of 2 ends are sentinel kernels: some records are missing."
        )
    alone = sum(not kernel.graph for kernel in kernels)
    if alone != launches:
        raise MeasureError(f"The host launched {launches:,} kernels, the profiler recorded {alone:,}.")
    replayed = len({kernel.graph for kernel in kernels if kernel.graph})
    if replayed != graphs:
        raise MeasureError(f"The host launched {graphs:,} CUDA graphs, the profiler recorded kernels of {replayed:,}.")
    work = ordered[1:-1]
    seconds: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for interval in work:
        if interval.kind == "kernel":
            seconds[interval.name] += interval.end_ns - interval.start_ns
            counts[interval.name] += 1
    streams = {interval.stream for interval in work}
    return DeviceActivity(
        busy_s=union_s(work),
        stream_s={stream: union_s(i for i in work if i.stream == stream) for stream in sorted(streams)},
        kernels=sum(interval.kind == "kernel" for interval in work),
        copies=sum(interval.kind == "copy" for interval in work),
        memsets=sum(interval.kind == "memset" for interval in work),
        kernel_s={name: value / 1e9 for name, value in seconds.most_common()},
        kernel_counts=dict(counts),
    )


def union_s(intervals: Iterable[Interval]) -> float:
    """Seconds in which at least one interval was open."""
    total, end = 0, 0
    for interval in sorted(intervals, key=lambda one: one.start_ns):
        if interval.end_ns > end:
            total += interval.end_ns - max(interval.start_ns, end)
            end = interval.end_ns
    return total / 1e9


BUSY_STEPS = 10
"""Kernels, copies, memsets and synchronizations are totals over this many steps; busy time is a mean."""
_SHORT_STEPS = 5
"""Enough if all of them have equal counts: ten steps then have twice the counts."""


def busy_steps(program: Program, device: torch.device) -> Findings:
    """Measure `busy_s` and launches on a GPU; return nothing on a CPU.

    Counts are totals over ten steps, not means: a kernel that only every second step launches must not disappear by division.
    If five steps in a row have equal counts, they are doubled; otherwise ten steps run.
    """
    if device.type != "cuda":
        return Findings()
    if program.period == 1:
        activity, found = _busy_of(program, device, _SHORT_STEPS, marked=True)
        if activity is None or activity.steps_alike:
            return found | _busy_metrics(activity, _SHORT_STEPS)
    activity, found = _busy_of(program, device, BUSY_STEPS, marked=False)
    return found | _busy_metrics(activity, BUSY_STEPS)


def _busy_of(
    program: Program, device: torch.device, steps: int, *, marked: bool
) -> tuple[DeviceActivity | None, Findings]:
    def work() -> None:
        for _ in range(steps):
            program.step()
            if marked:
                mark_step(device)

    return busy_of(work, device, marked_steps=steps if marked else 0)


def busy_of(
    work: Callable[[], None], device: torch.device, *, marked_steps: int = 0
) -> tuple[DeviceActivity | None, Findings]:
    """Return what the device did in `work`, its clock meanwhile, and its state before, during and after; None with a reason if void."""
    states = {"before": gpu_state()}
    watch = ClockWatch()

    def watched() -> None:
        work()
        # Most of the work is still running, so clock and throttling are those of the work.
        states["during"] = gpu_state()

    reasons: tuple[str, ...] = ()
    activity = None
    try:
        activity = device_activity(watched, device, marked_steps=marked_steps, watch=watch)
    except MeasureError as error:
        reasons = (str(error),)
    states["after"] = gpu_state()
    found = Findings(reasons=reasons, observed={"gpu_busy": states})
    clock = watch.clock()
    if clock is None:
        return activity, found
    states["clock"] = msgspec.to_builtins(clock)
    return activity, found | clock_metric(clock)


def _busy_metrics(activity: DeviceActivity | None, steps: int) -> Findings:
    if activity is None:
        return Findings()
    busy = Findings(metrics={"busy_s": metric("busy_s", activity.busy_s / steps, on_gpu=True)})
    return busy | launches(activity, per=f"{BUSY_STEPS} steps", times=BUSY_STEPS // steps)


_COUNTS = (
    "kernels",
    "copies",
    "memsets",
    "launches",
    "synchronizations",
    "device_allocations",
    "device_frees",
)


def launches(activity: DeviceActivity, *, per: str, times: int = 1) -> Findings:
    """Return what the device did and the host called for this work, and its kernels by family, all times `times`."""
    counts = {name: getattr(activity, name) * times for name in _COUNTS}
    families = families_of(activity.kernel_s, activity.kernel_counts)
    return Findings(
        metrics={name: metric(name, value, on_gpu=True, per=per) for name, value in counts.items()},
        kernel_families={
            name: KernelFamily(seconds=seconds * times, kernels=kernels * times)
            for name, (seconds, kernels) in families.items()
        },
    )
