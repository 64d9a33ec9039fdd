"""Capture work in one CUDA graph, and say what memory its replays take.

Work of fixed shapes captured once in a CUDA graph and replayed: one launch in place of thousands. And what that takes of memory.

A graph keeps what its work allocated in a private pool. After the capture the allocator counts the pool's temporaries as free, although no
other work may have them, and a replay allocates nothing: the counters see neither. `peak_bytes` counts the pool whole.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch

from hpc_core.case.errors import BuildError

_WARM_UPS = 3


@dataclass(frozen=True)
class Captured:
    """A graph to replay. `hidden_bytes` is used by every replay and shown by no counter of the allocator after the capture."""

    graph: torch.cuda.CUDAGraph
    hidden_bytes: int

    def __call__(self) -> None:
        """Replay it."""
        self.graph.replay()


_OUTSIDE: WeakSet[Any] = WeakSet()
"""Graphs whose cuBLAS workspace lies outside their pool."""


def keep_workspaces(graph: Any) -> None:
    """While this graph lives no workspace is let go: it was captured on a stream that had one already, and its replays write there."""
    _OUTSIDE.add(graph)


def forget_workspaces() -> None:
    """Let all of this process's cuBLAS workspaces go: 32 MiB on Hopper for each stream that ever multiplied, until the end of the process.

    The next product on a stream makes its own anew. One that a graph was captured with, where there was none before, lies in the graph's private
    pool: its replays go on using it. Nothing is let go while a graph lives that needs one elsewhere (`keep_workspaces`).
    """
    if _OUTSIDE:
        return
    cuda: Any = torch._C
    cuda._cuda_clearCublasWorkspaces()


def make_workspace(device: torch.device) -> None:
    """A product on the current stream: its cuBLAS workspace is there then, if it had been let go."""
    one = torch.ones(1, 1, device=device)
    torch.mm(one, one)


def captured(
    work: Callable[[], None],
    device: torch.device,
    *,
    before: Callable[[], None],
    generator: torch.Generator | None = None,
    pool: Any = None,
) -> Captured:
    """Run `work` a few times, then capture it; `before` puts the state that it changes back before each time.

    What `work` allocates and frees while it is captured stays in the graph's private pool: the allocator calls it free, and each replay
    writes there. So the highest point of the capture above what it left is the graph's own; what the driver keeps of its nodes is not in it. Graphs
    that never run at once, and whose results are held for as long as they are wanted, may share a `pool` (`torch.cuda.graph_pool_handle()`): the largest of them is then what they use.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            before()
            work()
    torch.cuda.current_stream(device).wait_stream(stream)
    before()
    torch.cuda.synchronize(device)
    gc.collect()
    forget_workspaces()
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    torch.cuda.reset_peak_memory_stats(device)
    with torch.cuda.graph(graph, pool=pool):
        work()
    forget_workspaces()
    hidden = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
    before()
    return Captured(graph, hidden)


class CapturedWork:
    """A CUDA graph of `work`, which must have run on `stream` before: compiling, tuning and first allocations are then over.

    Raises:
        BuildError: the work cannot be captured; torch's reason is in the message, and its error the cause.
    """

    def __init__(self, work: Callable[[], None], stream: torch.cuda.Stream, *, other_threads: bool = False):
        """`other_threads`: threads that the work does not know may call CUDA meanwhile, as those that pin a loader's batches do.

        CUDA's mode "global" would make such a call fail, and the capture with it; "thread_local" holds only this thread to the rules.
        """
        self._device = stream.device
        self._graph = torch.cuda.CUDAGraph()
        keep_workspaces(self)  # the stream has multiplied before
        torch.cuda.synchronize(self._device)
        gc.collect()
        torch.cuda.empty_cache()  # what is cached outside cannot serve the pool
        torch.cuda.reset_peak_memory_stats(self._device)
        first: list[Exception] = []
        try:
            mode = "thread_local" if other_threads else "global"
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode=mode):
                try:
                    work()
                except Exception as error:
                    first.append(error)  # ending a broken capture raises too, and would hide the reason
                    raise
        except Exception as error:
            cause = first[0] if first else error
            raise BuildError(
                f"graph=True: the step cannot be captured in a CUDA graph: {type(cause).__name__}: {cause}"
            ) from cause
        torch.cuda.synchronize(self._device)
        self.capture_peak_bytes = int(torch.cuda.max_memory_allocated(self._device))
        """Highest allocated bytes of the process while it was captured."""

    def replay(self) -> None:
        """Queue the work on the current stream."""
        self._graph.replay()

    def pool_bytes(self) -> tuple[int, int]:
        """Bytes that the private pool holds of the device, and how many of these the allocator counts as allocated."""
        pool = tuple(self._graph.pool())
        segments: list[dict[str, Any]] = torch.cuda.memory_snapshot()
        own = [segment for segment in segments if tuple(segment["segment_pool_id"]) == pool]
        return sum(one["total_size"] for one in own), sum(one["allocated_size"] for one in own)

    def peak_bytes(self) -> int:
        """Highest bytes of capture and replay: what is allocated outside the pool, which a replay does not change, and the whole pool."""
        held, counted = self.pool_bytes()
        return max(self.capture_peak_bytes, int(torch.cuda.memory_allocated(self._device)) - counted + held)
