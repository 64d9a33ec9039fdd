"""CUDA graphs: capture work once, replay it with one launch, and report the memory that replays take.

A graph keeps what its work allocated in a private pool. After the capture the allocator counts the pool's temporaries as free, although no
other work may have them, and a replay allocates nothing. No counter shows them, so both ways to capture report them: `captured` warms
up by itself on a stream of its own; `CapturedWork` captures work that has already run on the caller's stream.
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
    """A graph to replay. Every replay uses `hidden_bytes`, which the allocator's counters do not show after the capture."""

    graph: torch.cuda.CUDAGraph
    hidden_bytes: int

    def __call__(self) -> None:
        """Replay it."""
        self.graph.replay()


_OUTSIDE: WeakSet[Any] = WeakSet()
"""Graphs whose cuBLAS workspace lies outside their pool."""


def keep_workspaces(graph: Any) -> None:
    """Free no workspace while this graph lives: it was captured on a stream that had one already, and its replays write there."""
    _OUTSIDE.add(graph)


def forget_workspaces() -> None:
    """Free all cuBLAS workspaces of this process: on Hopper 32 MiB for each stream that ever multiplied, until the process ends.

    The next product on a stream makes a new one. A workspace that was made during a capture lies in the graph's private pool, and its replays go on
    using it. Nothing is freed while a graph lives that needs one elsewhere (`keep_workspaces`).
    """
    if _OUTSIDE:
        return
    cuda: Any = torch._C
    cuda._cuda_clearCublasWorkspaces()


def make_workspace(device: torch.device) -> None:
    """Multiply on the current stream, so that its cuBLAS workspace exists even if it was freed."""
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
    """Run `work` a few times, then capture it. `before` restores the state that the work changes, before each run.

    `hidden_bytes` is the peak of the capture above what it leaves allocated, without what the driver keeps for the graph's nodes. Graphs that
    never run at the same time, and whose results are held for as long as they are needed, may share a `pool`
    (`torch.cuda.graph_pool_handle()`): together they use what the largest of them uses.
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


def unused_pool_bytes() -> int:
    """Return the bytes of all captured graphs' private pools that the allocator does not count as allocated.

    Nothing else may use them. For graphs that somebody else captured, such as torch.compile's mode "reduce-overhead".
    """
    segments: list[dict[str, Any]] = torch.cuda.memory_snapshot()
    private = [segment for segment in segments if tuple(segment["segment_pool_id"]) != (0, 0)]
    return sum(segment["total_size"] - segment["allocated_size"] for segment in private)


class CapturedWork:
    """A CUDA graph of `work`, which must have run on `stream` before, so that compiling, tuning and first allocations are over.

    Raises:
        BuildError: the work cannot be captured; torch's reason is in the message, and its error the cause.
    """

    def __init__(self, work: Callable[[], None], stream: torch.cuda.Stream, *, other_threads: bool = False):
        """Set `other_threads` if other threads may call CUDA meanwhile, as those that pin a loader's batches do.

        In CUDA's mode "global" such a call would fail, and the capture with it; "thread_local" restricts only this thread.
        """
        self._device = stream.device
        self._graph = torch.cuda.CUDAGraph()
        keep_workspaces(self)  # the stream has multiplied before
        torch.cuda.synchronize(self._device)
        gc.collect()
        torch.cuda.empty_cache()  # the pool cannot use what is cached outside it
        torch.cuda.reset_peak_memory_stats(self._device)
        first: list[Exception] = []
        try:
            mode = "thread_local" if other_threads else "global"
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode=mode):
                try:
                    work()
                except Exception as error:
                    first.append(error)  # ending a broken capture raises too and would hide the reason
                    raise
        except Exception as error:
            cause = first[0] if first else error
            raise BuildError(
                f"graph=True: the step cannot be captured in a CUDA graph: {type(cause).__name__}: {cause}"
            ) from cause
        torch.cuda.synchronize(self._device)
        self.capture_peak_bytes = int(torch.cuda.max_memory_allocated(self._device))
        """Peak allocated bytes of the process during the capture."""

    def replay(self) -> None:
        """Queue the work on the current stream."""
        self._graph.replay()

    def pool_bytes(self) -> tuple[int, int]:
        """Return the bytes of device memory in the private pool, and how many of them the allocator counts as allocated."""
        pool = tuple(self._graph.pool())
        segments: list[dict[str, Any]] = torch.cuda.memory_snapshot()
        own = [segment for segment in segments if tuple(segment["segment_pool_id"]) == pool]
        return sum(one["total_size"] for one in own), sum(one["allocated_size"] for one in own)

    def peak_bytes(self) -> int:
        """Return the peak bytes of capture and replay: the whole pool, and what is allocated outside it, which a replay does not change."""
        held, counted = self.pool_bytes()
        return max(self.capture_peak_bytes, int(torch.cuda.memory_allocated(self._device)) - counted + held)
