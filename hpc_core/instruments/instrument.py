"""A measurement is a list of instruments that observe a running program one after another and return findings."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.utils._python_dispatch import _disable_current_modes

from hpc_core.instruments.clock import synchronize
from hpc_core.record.findings import Findings
from hpc_core.record.job import Event, Phase


class Phases:
    """Tell the launcher which phase a job is in, and add up the seconds of each."""

    def __init__(self, emit: Callable[[Event], None], began: float):
        self._emit = emit
        self._phase: str | None = "import"
        self._entered = began
        self._seconds: dict[str, float] = {}

    def enter(self, name: str) -> None:
        """End the current phase and begin this one."""
        now = time.perf_counter()
        if self._phase is not None:
            self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._entered
        self._phase, self._entered = name, now
        self._emit(Phase(name))

    @contextlib.contextmanager
    def audit(self, device: torch.device) -> Iterator[None]:
        """Inspect a pass that is being counted: counters ignore the block, and its time counts as the audit's."""
        synchronize(device)
        began = time.perf_counter()
        with _disable_current_modes():
            yield
        synchronize(device)
        took = time.perf_counter() - began
        self._seconds["audit"] = self._seconds.get("audit", 0.0) + took
        self._entered += took

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each phase that has ended."""
        return {name: round(value, 4) for name, value in self._seconds.items()}


@dataclass(frozen=True)
class Instrument:
    """One entry of a measurement."""

    name: str
    phase: str | None
    """The phase that it begins; None continues the current one."""
    take: Callable[[Findings], Findings]
    """Observes the program and returns findings. It receives those of the instruments before it."""
    captured: bool = True
    """False: steps run operator by operator, so that a step that is a CUDA graph can be observed."""
    changes_state: bool = False
    """True: the program cannot run afterwards."""


class _Uncaptured(Protocol):
    def uncaptured(self) -> contextlib.AbstractContextManager[None]:
        """Run every step in the block operator by operator."""


def observe(
    instruments: Iterable[Instrument], program: _Uncaptured, phases: Phases, found: Findings | None = None
) -> Findings:
    """Run the instruments in order, and return their findings added to `found`."""
    found = Findings() if found is None else found
    for each in instruments:
        if each.phase is not None:
            phases.enter(each.phase)
        with contextlib.nullcontext() if each.captured else program.uncaptured():
            found |= each.take(found)
    return found
