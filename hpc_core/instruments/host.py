"""Count the host's work exactly: bytecodes, Python calls and calls into C, by function.

A clock on the host varies by a third between processes; these counts are equal in every run of one Python minor version. They do
not see what C code does, nor sleeping, waiting for files or for locks: wall time sees those.

Python 3.12 and later count with sys.monitoring in every thread that runs the work, those of autograd included. Python 3.11 has only
sys.settrace and sys.setprofile, which count in the calling thread; on a CPU, backward runs there too.
"""

from __future__ import annotations

import gc
import itertools
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Self

from hpc_core.case.errors import MeasureError
from hpc_core.instruments.garbage import uncollected
from hpc_core.record.findings import Findings
from hpc_core.record.metrics import metric
from hpc_core.record.profile import FunctionUse

_OURS = tuple(str(Path(__file__).parents[1] / room) + os.sep for room in ("instruments", "integrations", "worker"))
"""Code of these folders observes the work, and is no part of it."""


@dataclass
class HostCost:
    """What the host executed, by code object."""

    bytecodes: Counter[CodeType] = field(default_factory=Counter)
    calls: Counter[CodeType] = field(default_factory=Counter)
    """Calls of Python functions, by the function called; resuming a generator counts as a call."""
    c_calls: Counter[CodeType] = field(default_factory=Counter)
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
        rows: Counter[tuple[str, str]] = Counter()
        lines: dict[tuple[str, str], int] = {}
        counts: dict[tuple[str, str], list[int]] = {}
        for code in {*self.bytecodes, *self.calls, *self.c_calls}:
            key = (_file(code.co_filename), code.co_qualname)
            lines[key] = min(code.co_firstlineno, lines.get(key, code.co_firstlineno))
            mine = counts.setdefault(key, [0, 0, 0])
            for at, counter in enumerate((self.bytecodes, self.calls, self.c_calls)):
                mine[at] += counter[code]
            rows[key] += self.bytecodes[code]
        ordered = sorted(rows, key=lambda key: (-rows[key], key))
        return tuple(FunctionUse(work, *key, lines[key], *counts[key]) for key in ordered)

    def __sub__(self, part: HostCost) -> HostCost:
        """Return what is left without a part of the work."""
        return HostCost(
            *(
                Counter({code: mine[code] - other[code] for code in {*mine, *other} if mine[code] != other[code]})
                for mine, other in zip(self._counters(), part._counters(), strict=True)
            )
        )

    def _counters(self) -> tuple[Counter[CodeType], Counter[CodeType], Counter[CodeType]]:
        return self.bytecodes, self.calls, self.c_calls


def host_cost(work: Callable[[], Any]) -> HostCost:
    """Run `work` without garbage collection and return what the host executed for it.

    Run it once before, so that nothing is counted that only a first call does.
    """
    with uncollected(), HostCounter() as counter:
        work()
    return counter.cost


def step_cost(work: Callable[[], Any], *, on_gpu: bool) -> Findings:
    """Return the host's cost of a step, and the objects of it that stay. The step must have run before."""
    return host_findings({"": (host_cost(work), None)}, on_gpu=on_gpu) | kept_objects(work)


def host_findings(parts: Mapping[str, tuple[HostCost, str | None]], *, on_gpu: bool) -> Findings:
    """Return the metrics of one or more parts of the work, and the last part's functions.

    Args:
        parts: the cost, and what the totals cover, by the end of the metrics' names: "" or "_decode".
        on_gpu: whether it ran on a GPU.
    """
    metrics = {
        f"{name}{part}": metric(f"{name}{part}", total, on_gpu=on_gpu, per=per)
        for part, (cost, per) in parts.items()
        for name, total in cost.totals().items()
    }
    functions = [row for part, (cost, _) in parts.items() for row in cost.functions(part.removeprefix("_"))]
    return Findings(metrics=metrics, functions=tuple(functions))


_KEPT_PASSES = 3


def kept_objects(work: Callable[[], Any]) -> Findings:
    """Return how many objects that the garbage collector tracks each further pass leaves behind: 0 for one that leaks none.

    Tensors, modules, lists and dictionaries are tracked; numbers and strings are not. The least of three passes counts, because
    a cache that fills is no leak.
    """
    counts = []
    gc.collect()
    gc.freeze()  # what is there already need not be walked again
    try:
        for _ in range(1 + _KEPT_PASSES):
            work()
            gc.collect()
            counts.append(len(gc.get_objects()))
    finally:
        gc.unfreeze()
    least = min(later - earlier for earlier, later in itertools.pairwise(counts))
    return Findings(metrics={"kept_objects": metric("kept_objects", max(0, least))})


class HostCounter:
    """Counts what the host executes in a `with` block, into `cost`, without the code of this package's instruments.

    On Python 3.11 only functions that are called in the block are counted, not the ones that run already.
    """

    def __init__(self) -> None:
        self.cost = HostCost()

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
            counters = {
                events.INSTRUCTION: self.cost.bytecodes,
                events.PY_START: self.cost.calls,
                events.PY_RESUME: self.cost.calls,
                events.C_RETURN: self.cost.c_calls,
                events.C_RAISE: self.cost.c_calls,
            }
            counted = _counted_threads()
            for event, counter in counters.items():
                monitoring.register_callback(self._tool, event, _adding(counter, counted))
            # C_RETURN and C_RAISE come only with CALL, which alone has no callback.
            monitoring.set_events(self._tool, events.CALL | sum(counters))
            return self

        def __exit__(self, *_: object) -> None:
            """Stop counting."""
            sys.monitoring.set_events(self._tool, 0)
            sys.monitoring.free_tool_id(self._tool)

    else:

        def __enter__(self) -> Self:
            """Begin to count in this thread."""
            bytecodes, calls, c_calls = self.cost.bytecodes, self.cost.calls, self.cost.c_calls

            def each(frame: FrameType, event: str, _: Any) -> Any:
                if event == "opcode":
                    bytecodes[frame.f_code] += 1
                return each

            def enter(frame: FrameType, _: str, __: Any) -> Any:
                if _is_ours(frame.f_code):
                    return None
                frame.f_trace_opcodes, frame.f_trace_lines = True, False
                return each

            def call(frame: FrameType, event: str, _: Any) -> None:
                counter = {"call": calls, "c_call": c_calls}.get(event)
                if counter is not None and not _is_ours(frame.f_code):
                    counter[frame.f_code] += 1

            self._before = sys.gettrace(), sys.getprofile()
            sys.setprofile(call)
            sys.settrace(enter)
            return self

        def __exit__(self, *_: object) -> None:
            """Stop counting."""
            sys.settrace(self._before[0])
            sys.setprofile(self._before[1])


def _is_ours(code: CodeType) -> bool:
    return code.co_filename.startswith(_OURS)


def _counted_threads() -> Callable[[int], bool]:
    """Return whether a thread counts, by its number: this one does, and those that Python did not start, such as autograd's."""
    known = {threading.get_ident(): True}

    def counts(ident: int) -> bool:
        if ident not in known:
            known[ident] = all(each.ident != ident for each in threading.enumerate())
        return known[ident]

    return counts


def _adding(counter: Counter[CodeType], counted: Callable[[int], bool]) -> Callable[..., None]:
    ours: dict[CodeType, bool] = {}

    def add(code: CodeType, *_: Any) -> None:
        mine = ours.get(code)
        if mine is None:
            mine = ours[code] = _is_ours(code)
        if not mine and counted(threading.get_ident()):
            counter[code] += 1

    return add


def _file(path: str) -> str:
    """Return a source file without the folder that it is imported from: "transformers/models/llama/modeling_llama.py"."""
    parents = (entry.rstrip("/") + "/" for entry in sys.path if entry)
    prefix = max((parent for parent in parents if path.startswith(parent)), key=len, default="")
    return path.removeprefix(prefix) if prefix else Path(path).name
