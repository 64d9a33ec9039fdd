"""Peak allocated bytes of each phase of a step, by the allocator's own counters.

Reading and resetting those counters happens on the host and waits for nothing, so the step runs as it always does.
"""

from __future__ import annotations

import torch

from hpc_core.instruments.program import Program

__all__ = ["PhasePeaks", "peaks_of"]


class PhasePeaks:
    """A mark that closes one phase and opens the next; `peaks` holds bytes by phase."""

    def __init__(self, device: torch.device):
        self._device = device
        self._phase: str | None = None
        self.peaks: dict[str, int] = {}

    def __call__(self, phase: str) -> None:
        """Close the phase that runs, open this one."""
        self.close()
        self._phase = phase

    def close(self) -> None:
        """Close the phase that runs."""
        peak = torch.cuda.max_memory_allocated(self._device)
        if self._phase is not None:
            self.peaks[self._phase] = max(peak, self.peaks.get(self._phase, 0))
        self._phase = None
        torch.cuda.reset_peak_memory_stats(self._device)


def peaks_of(program: Program, device: torch.device, steps: int) -> dict[str, int]:
    """The highest peak of each phase over `steps` steps, in bytes."""
    watch = PhasePeaks(device)
    watch.close()
    for _ in range(steps):
        program.step(watch)
        watch.close()
    return watch.peaks
