"""Count the host's work exactly: bytecodes, Python calls and calls into C, by function.

A clock on the host varies by a third between processes; these counts are equal in every run of one Python minor version. They do
not see what C code does. How often the host waits, for a file or a lock or asleep, is counted too; how long, wall time sees.

Python 3.12 and later count with sys.monitoring in every thread that runs the work, those of autograd included. Python 3.11 has only
sys.settrace and sys.setprofile, which count in the calling thread; on a CPU, backward runs there too.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import os
import resource
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, ClassVar, Self, TypeVar, cast

import torch

from hpc_core.case.errors import MeasureError
from hpc_core.instruments.counters import compiled_graphs
from hpc_core.instruments.garbage import uncollected
from hpc_core.record.findings import Findings
from hpc_core.record.metrics import metric
from hpc_core.record.profile import FunctionUse

_PACKAGE = Path(__file__).parents[1]
_TORCH = Path(torch.__file__).parent
_NOT_WORK = (
    *(f"{_PACKAGE / room}{os.sep}" for room in ("instruments", "integrations", "predict", "worker")),
    str(_PACKAGE / "faults" / "fault.py"),
    f"{_TORCH / '_subclasses'}{os.sep}",
    str(_TORCH / "_library" / "simple_registry.py"),
)
"""Code that observes the work, and that stands for a GPU: fake tensors, and how torch dispatches to them."""
Call = TypeVar("Call", bound=Callable[..., Any])


@dataclass
class HostCost:
    """What the host executed, by code object: by its `id`, because hashing a code object takes longer than running it."""

    codes: dict[int, CodeType] = field(default_factory=dict)
    bytecodes: Counter[int] = field(default_factory=Counter)
    calls: Counter[int] = field(default_factory=Counter)
    """Calls of Python functions, by the function called; resuming a generator counts as a call."""
    c_calls: Counter[int] = field(default_factory=Counter)
    """Calls of functions, types and other objects that are not Python functions, by the function that calls."""

    def totals(self) -> dict[str, int]:
        """Return the totals by metric."""
        return {
            "bytecodes": self.bytecodes.total(),
            "python_calls": self.calls.total(),
            "c_calls": self.c_calls.total(),
        }

    def functions(self, work: str) -> tuple[FunctionUse, ...]:
        """Return a row for each function, the one with the most bytecodes first; `work` names what ran."""
        lines: dict[tuple[str, str], int] = {}
        counts: dict[tuple[str, str], list[int]] = {}
        for number in {*self.bytecodes, *self.calls, *self.c_calls}:
            code = self.codes[number]
            key = (file_of(code.co_filename), code.co_qualname)
            lines[key] = min(code.co_firstlineno, lines.get(key, code.co_firstlineno))
            mine = counts.setdefault(key, [0, 0, 0])
            for at, counter in enumerate((self.bytecodes, self.calls, self.c_calls)):
                mine[at] += counter[number]
        ordered = sorted(counts, key=lambda key: (-counts[key][0], key))
        return tuple(FunctionUse(work, *key, lines[key], *counts[key]) for key in ordered)

    def __sub__(self, part: HostCost) -> HostCost:
        """Return what is left without a part of the work."""
        left = HostCost(self.codes | part.codes)
        for mine, whole, other in zip(left._counters(), self._counters(), part._counters(), strict=True):
            mine.update(whole)
            mine.subtract(other)
            for number in [number for number, count in mine.items() if not count]:
                del mine[number]
        return left

    def _counters(self) -> tuple[Counter[int], Counter[int], Counter[int]]:
        return self.bytecodes, self.calls, self.c_calls


def host_cost(work: Callable[[], Any]) -> HostCost:
    """Run `work` without garbage collection and return what the host executed for it.

    Run it once before, so that nothing is counted that only a first call does.
    """
    with uncollected(), HostCounter() as counter:
        work()
    return counter.cost


def step_cost(step: Callable[[], Any], *, on_gpu: bool) -> Findings:
    """Return what the host executes for a step. The step must have run before."""
    return _findings({"": (host_cost(step), None)}, on_gpu=on_gpu)


def query_cost(first: HostCost, whole: HostCost, tokens: int, *, on_gpu: bool) -> Findings:
    """Return what the host executes for a query, and for the tokens that it decodes after the first.

    Args:
        first: a query of one new token.
        whole: the same query with `tokens` more of them.
        tokens: how many more.
        on_gpu: whether it ran on a GPU.
    """
    parts = {"": (whole, f"prefill and {tokens} tokens"), "_decode": (whole - first, f"{tokens} tokens")}
    return _findings(parts, on_gpu=on_gpu)


def _findings(parts: Mapping[str, tuple[HostCost, str | None]], *, on_gpu: bool) -> Findings:
    """Return the metrics and functions of each part by the end of its metrics' names, with what its totals cover."""
    metrics = {
        f"{name}{part}": metric(f"{name}{part}", total, on_gpu=on_gpu, per=per)
        for part, (cost, per) in parts.items()
        for name, total in cost.totals().items()
    }
    functions = [row for part, (cost, _) in parts.items() for row in cost.functions(part.removeprefix("_"))]
    return Findings(metrics=metrics, functions=tuple(functions))


_KEPT_PASSES = 3


def further_passes(work: Callable[[], Any], *, on_gpu: bool) -> Findings:
    """Return how many objects each further pass leaves behind, and how often it waits: 0 for one that leaks none and never waits.

    Objects are those that the garbage collector tracks: tensors, modules, lists and dictionaries, not numbers and strings. A wait
    is a voluntary switch to another thread (getrusage's ru_nvcsw, which a busy machine does not raise): a sleep, a read that
    blocks, a lock that is taken. torch runs on one thread meanwhile, as its threads wait for one another, except after torch.compile,
    whose graphs are compiled again for another number of threads. Of objects the least of three passes counts, because a cache
    that fills is no leak; waits are those of four passes, because not every one may wait.
    """
    counts, waits = list[int](), 0
    with _one_thread():
        for _ in range(1 + _KEPT_PASSES):
            before = _waits()
            work()
            waits += _waits() - before
            gc.collect()
            counts.append(len(gc.get_objects()))
    least = min(later - earlier for earlier, later in itertools.pairwise(counts))
    return Findings(
        metrics={
            "kept_objects": metric("kept_objects", max(0, least), on_gpu=on_gpu),
            "waits": metric("waits", waits, on_gpu=on_gpu),
        }
    )


def _waits() -> int:
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    changed = before > 1 and not compiled_graphs()
    if changed:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if changed:
            torch.set_num_threads(before)


def as_after_compiling() -> None:
    """Let torch make the changes to its optimizers that it makes when a function is compiled for the first time in a process.

    Importing peft or bitsandbytes causes them too. A step would otherwise execute more, or less, by what was imported before.
    """
    torch.compile(_nothing, backend="eager")


def _nothing() -> None:
    pass


class HostCounter:
    """Counts what the host executes in a `with` block, into `cost`, without the code of instruments and of fake tensors.

    On Python 3.11 only functions that are called in the block are counted, not the ones that run already.
    """

    _active: ClassVar[HostCounter | None] = None

    def __init__(self) -> None:
        self.cost = HostCost()
        self._work: dict[int, bool] = {}
        """Whether code is part of the work, by its `id`; `cost.codes` keeps it alive."""
        self._paused = set[int]()
        """Threads that are not counted for the moment."""

    @classmethod
    def pausing(cls, call: Call) -> Call:
        """Decorate a function that stands for hardware, so that nothing it calls is counted."""

        @functools.wraps(call)
        def paused(*args: Any, **kwargs: Any) -> Any:
            active = cls._active
            if active is None:
                return call(*args, **kwargs)
            state = active._pause()
            try:
                return call(*args, **kwargs)
            finally:
                active._resume(state)

        return cast("Call", paused)

    def _is_work(self, code: CodeType) -> bool:
        mine = self._work.get(id(code))
        if mine is None:
            self.cost.codes[id(code)] = code
            mine = self._work[id(code)] = not code.co_filename.startswith(_NOT_WORK)
        return mine

    if sys.version_info >= (3, 12):

        def __enter__(self) -> Self:
            """Begin to count, in every thread but those that Python code started: they do other work, such as loading data.

            Raises:
                MeasureError: other tools hold all of sys.monitoring's numbers.
            """
            monitoring, events = sys.monitoring, sys.monitoring.events
            free = [number for number in range(6) if monitoring.get_tool(number) is None]
            if not free:
                raise MeasureError(
                    "sys.monitoring has six tools already; end a debugger or profiler to count bytecodes."
                )
            self._tool = free[-1]
            monitoring.use_tool_id(self._tool, "hpc-core")
            paused, this_thread, counted = self._paused, threading.get_ident, _counted_threads()
            owner = this_thread()

            def adding(counter: Counter[int]) -> Callable[..., None]:
                # Called for every bytecode. Further arguments, where an event has them, would make a tuple as *_.
                def add(code: CodeType, _: Any, __: Any = None, ___: Any = None) -> None:
                    number, thread = id(code), this_thread()
                    if (thread == owner or counted(thread)) and thread not in paused:
                        if number in counter:
                            counter[number] += 1
                        elif self._is_work(code):
                            counter[number] = 1

                return add

            counters = {
                events.INSTRUCTION: self.cost.bytecodes,
                events.PY_START: self.cost.calls,
                events.PY_RESUME: self.cost.calls,
                events.C_RETURN: self.cost.c_calls,
                events.C_RAISE: self.cost.c_calls,
            }
            for event, counter in counters.items():
                monitoring.register_callback(self._tool, event, adding(counter))
            # C_RETURN and C_RAISE come only with CALL, which has no callback of its own.
            monitoring.set_events(self._tool, events.CALL | sum(counters))
            HostCounter._active = self
            return self

        def __exit__(self, *_: object) -> None:
            """Stop counting."""
            HostCounter._active = None
            sys.monitoring.set_events(self._tool, 0)
            sys.monitoring.free_tool_id(self._tool)

        def _pause(self) -> bool:
            ident = threading.get_ident()
            outermost = ident not in self._paused
            self._paused.add(ident)
            return outermost

        def _resume(self, outermost: bool) -> None:
            if outermost:
                self._paused.discard(threading.get_ident())

    else:

        def __enter__(self) -> Self:
            """Begin to count in this thread."""
            cost = self.cost

            def each(frame: FrameType, event: str, _: Any) -> Any:
                if event == "opcode":
                    cost.bytecodes[id(frame.f_code)] += 1
                return each

            def enter(frame: FrameType, _: str, __: Any) -> Any:
                if not self._is_work(frame.f_code):
                    return None
                frame.f_trace_opcodes, frame.f_trace_lines = True, False
                return each

            def call(frame: FrameType, event: str, _: Any) -> None:
                counter = {"call": cost.calls, "c_call": cost.c_calls}.get(event)
                if counter is not None and self._is_work(frame.f_code):
                    counter[id(frame.f_code)] += 1

            self._before = sys.gettrace(), sys.getprofile()
            sys.setprofile(call)
            sys.settrace(enter)
            HostCounter._active = self
            return self

        def __exit__(self, *_: object) -> None:
            """Stop counting."""
            HostCounter._active = None
            sys.settrace(self._before[0])
            sys.setprofile(self._before[1])

        def _pause(self) -> tuple[Any, Any]:
            before = sys.gettrace(), sys.getprofile()
            sys.setprofile(None)
            sys.settrace(None)
            return before

        def _resume(self, before: tuple[Any, Any]) -> None:
            sys.settrace(before[0])
            sys.setprofile(before[1])


def _counted_threads() -> Callable[[int], bool]:
    """Return whether a thread counts, by its number: this one does, and those that Python did not start, such as autograd's."""
    known = {threading.get_ident(): True}

    def counts(ident: int) -> bool:
        if ident not in known:
            frame: FrameType | None = sys._getframe()
            while frame is not None:
                outermost, frame = frame, frame.f_back
            known[ident] = outermost.f_code.co_filename != threading.__file__
        return known[ident]

    return counts


def file_of(path: str) -> str:
    """Return a source file without the folder that it is imported from: "transformers/models/llama/modeling_llama.py"."""
    parents = (entry.rstrip("/") + "/" for entry in sys.path if entry)
    prefix = max((parent for parent in parents if path.startswith(parent)), key=len, default="")
    return path.removeprefix(prefix) if prefix else Path(path).name
