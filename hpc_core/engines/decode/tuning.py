"""Choose a kernel's block sizes by trying them, in the place where they will run: on the weights of all layers, inside a CUDA graph.

All layers together are more than a GPU's second-level cache holds, so each candidate reads from memory, as a token does.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["choose_blocks", "graph_seconds"]

_REPLAYS = 5


def choose_blocks(products: list[Any], x: torch.Tensor, out: torch.Tensor) -> str:
    """Give all these products, which are alike, the fastest of their candidates; says which and how long one of them took."""
    best: tuple[float, Any] | None = None
    for blocks in products[0].candidates():
        for product in products:
            product.blocks = blocks
        try:
            seconds = graph_seconds(lambda: [product(x, out) for product in products])
        except Exception as error:  # too large for this GPU's shared memory, say: another one fits
            if isinstance(error, torch.OutOfMemoryError):
                raise
            continue
        if best is None or seconds < best[0]:
            best = (seconds, blocks)
    if best is None:
        raise RuntimeError(f"No block sizes fit the product {products[0].likeness} on {torch.cuda.get_device_name()}.")
    for product in products:
        product.blocks = best[1]
    return f"{best[1].said}: {best[0] / len(products) * 1e6:.2f} us"


def graph_seconds(work: Any) -> float:
    """Device seconds of `work`, the least of a few replays of its graph."""
    work()  # compiles, outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    seconds: list[float] = []
    for _ in range(_REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return min(seconds)
