"""Does memory creep? What stays allocated after each step of a long run over real, varying lengths."""

from __future__ import annotations

import sys

import torch

from hpc_core.instruments.owners import living_tensors, owned_bytes
from hpc_core.record.record import Fact
from hpc_core.worker.metrics import measured_bytes, ratio, reported
from hpc_core.worker.session import Session

__all__ = ["Soak"]

_SAMPLES = 20
_FLAT_BYTES = 64 * 1024
"""Scalars that a library keeps; a forgotten loss tensor a step is 512 bytes on a GPU and shows after 128 steps."""


class Soak:
    """Samples what is allocated between steps, twenty times in a run."""

    def __init__(self, session: Session, steps: int):
        self._session = session
        self._every = max(1, steps // _SAMPLES)
        self._held: list[int] = []

    def after_step(self, done: int) -> None:
        """The step number `done` (from 1) has ended; between steps only what is kept is alive."""
        if done % self._every == 0:
            self._held.append(self._held_bytes())

    def _held_bytes(self) -> int:
        session = self._session
        if session.on_gpu:
            return torch.cuda.memory_allocated(session.device)
        return owned_bytes(living_tensors(session.device))

    def close(self, steps: int) -> None:
        """Growth from the first quarter of the samples to the last, as a fact and a metric; fragmentation and compilations beside it."""
        session, quarter = self._session, max(1, len(self._held) // 4)
        growth = min(self._held[-quarter:]) - max(self._held[:quarter])
        said = "flat" if growth <= _FLAT_BYTES else f"+{growth:,} bytes over {steps} steps"
        session.audit["memory_growth"] = Fact(asked="flat", seen=said)
        # A shrinking one is no growth; the metric is for the eye, the fact decides.
        session.metrics["held_growth_bytes"] = measured_bytes(max(growth, 0), machine=session.on_gpu, gated=False)
        session.metrics["compilations"] = reported(
            _compilations(), "1", note="graphs that torch.compile made in this process"
        )
        if session.on_gpu:
            reserved = torch.cuda.memory_reserved(session.device)
            share = torch.cuda.max_memory_allocated(session.device) / max(reserved, 1)
            session.metrics["used_of_reserved"] = ratio(
                share, note="peak allocated over reserved; the rest is fragmentation"
            )


def _compilations() -> int:
    """Graphs that dynamo has compiled; 0 where it was never imported."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return 0 if dynamo is None else int(dynamo.counters["stats"]["unique_graphs"])
