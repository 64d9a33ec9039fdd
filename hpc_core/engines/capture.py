"""Capture work in one CUDA graph, and say what memory its replays take."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch

__all__ = ["Captured", "captured", "forget_workspaces", "keep_workspaces", "make_workspace"]

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
