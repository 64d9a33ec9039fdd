"""Capture work in one CUDA graph, and say what memory its replays take."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Captured", "captured", "forget_workspaces"]

_WARM_UPS = 3


@dataclass(frozen=True)
class Captured:
    """A graph to replay. `hidden_bytes` is used by every replay and shown by no counter of the allocator after the capture."""

    graph: torch.cuda.CUDAGraph
    hidden_bytes: int

    def __call__(self) -> None:
        """Replay it."""
        self.graph.replay()


def forget_workspaces() -> None:
    """Let cuBLAS's workspaces go: 32 MiB on Hopper for each stream that ever multiplied, until the end of the process.

    One that a graph was captured with stays in the graph's private pool, where its replays go on using it.
    """
    cuda: Any = torch._C
    cuda._cuda_clearCublasWorkspaces()


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
    writes there. So the highest point of the capture above what it left is the graph's own. Graphs that never run at once, and leave nothing
    in it, may share a `pool` (`torch.cuda.graph_pool_handle()`); the largest of them is then all of theirs.
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
