"""Work of fixed shapes captured once in a CUDA graph and replayed: one launch in place of thousands. And what that takes of memory.

A graph keeps what its work allocated in a private pool. After the capture the allocator counts the pool's temporaries as free, although no
other work may have them, and a replay allocates nothing: the counters see neither. `peak_bytes` counts the pool whole.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from hpc_core.case.errors import BuildError
from hpc_core.engines.capture import keep_workspaces

__all__ = ["CapturedWork"]


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
