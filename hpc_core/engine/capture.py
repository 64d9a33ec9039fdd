"""Capture work in one CUDA graph, and say what memory its replays take."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["Captured", "captured"]

_WARM_UPS = 3


@dataclass(frozen=True)
class Captured:
    """A graph to replay. `hidden_bytes` is used by every replay and shown by no counter of the allocator after the capture."""

    graph: torch.cuda.CUDAGraph
    hidden_bytes: int

    def __call__(self) -> None:
        """Replay it."""
        self.graph.replay()


def captured(
    work: Callable[[], None],
    device: torch.device,
    *,
    before: Callable[[], None],
    generator: torch.Generator | None = None,
) -> Captured:
    """Run `work` a few times, then capture it; `before` puts the state that it changes back before each time.

    What `work` allocates and frees while it is captured stays in the graph's private pool: the allocator calls it free, and each replay
    writes there. So the highest point of the capture above what it left is the graph's own.
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
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    torch.cuda.reset_peak_memory_stats(device)
    with torch.cuda.graph(graph):
        work()
    hidden = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
    before()
    return Captured(graph, hidden)
