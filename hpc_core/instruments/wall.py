"""Time calls by the host's clock so that they can be judged: beside a canary, and without those that waited for a core.

The speed of a host changes from one second to the next. So each call stands between two runs of the host canary, work of the host
that no code under test changes, and their quotient says what the call costs on a host of any speed. A call that the kernel kept
waiting for a core does not count: where threads spin for one another, a busy neighbour makes a step a hundred times as long.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hpc_core.instruments.clock import quiet, seconds_of
from hpc_core.instruments.program import Program
from hpc_core.record.findings import Findings
from hpc_core.record.metrics import WAITED, canaries_of, metric
from hpc_core.record.record import Metric

_CANARY_CALLS = 1000
_WAITED_SHARE = 0.1
"""A call that waited longer for a core than this share of its time does not count."""


@dataclass(frozen=True)
class _Run:
    """One timed run."""

    seconds: float
    waited_s: float
    """For a core, while ready to run."""


class WallTimer:
    """Times calls, each between two runs of the canary: small operators, which on a GPU launch as many kernels.

    That is what a model that waits for its host mostly does. A thousand calls take 1 to 5 ms. Their memory is free again before
    the timed call begins.
    """

    def __init__(self, device: torch.device):
        """Run the canary once, so that nothing is run for the first time when it counts."""
        self._device = device
        self._canaries: list[_Run] = []
        self._calls: list[_Run] = []
        self._canary()

    def time(self, call: Callable[[], None]) -> float:
        """Run the canary, then the call; return the call's seconds, from an idle device to an idle device."""
        self._canaries.append(self._canary())
        self._calls.append(self._timed(call))
        return self._calls[-1].seconds

    def finish(self) -> dict[str, Metric]:
        """Run the canary a last time, and return its median as `host_canary_s`."""
        self._canaries.append(self._canary())
        return {"host_canary_s": metric("host_canary_s", statistics.median(run.seconds for run in self._canaries))}

    def metrics(self, name: str, samples: Sequence[Sequence[float]]) -> dict[str, Metric]:
        """Return a wall time and its quotient to the canary: medians over the calls that did not wait for a core.

        If more than half of them waited, the time is shown and not judged.

        Args:
            name: of the wall time.
            samples: in seconds, those of each call.

        Raises:
            ValueError: not as many calls as were timed, or `finish` was not called.
        """
        around = list(zip(self._canaries[:-1], self._calls, self._canaries[1:], samples, strict=True))
        shares = [sum(run.waited_s for run in runs) / sum(run.seconds for run in runs) for *runs, _ in around]
        disturbed = [share > _WAITED_SHARE for share in shares]
        seconds, canaries = list[float](), list[float]()
        for (before, _, after, taken), left_out in zip(around, disturbed, strict=True):
            if not left_out or all(disturbed):
                seconds += taken
                canaries += [each / ((before.seconds + after.seconds) / 2) for each in taken]
        count = sum(disturbed)
        note = f"{count} of {len(shares)} {WAITED}" if count else None
        judged = False if 2 * count > len(shares) else None
        every = [each for taken in samples for each in taken]
        return {
            name: metric(name, statistics.median(seconds), samples=every, note=note, gated=judged),
            canaries_of(name): metric(canaries_of(name), samples=[statistics.median(canaries)]),
        }

    def _canary(self) -> _Run:
        x = torch.zeros(64, dtype=torch.float32, device=self._device)

        def calls() -> None:
            for _ in range(_CANARY_CALLS):
                x.add_(1)

        return self._timed(calls)

    def _timed(self, call: Callable[[], None]) -> _Run:
        before = _waited_s()
        seconds = seconds_of(call, self._device)
        return _Run(seconds, _waited_s() - before)


def _waited_s() -> float:
    """Return the seconds that this thread has waited for a core while ready to run; 0 where the kernel does not tell.

    The second number of schedstat, in ns: Documentation/scheduler/sched-stats.rst of Linux.
    """
    try:
        return int(Path("/proc/thread-self/schedstat").read_text(encoding="ascii").split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


def wall_steps(program: Program, device: torch.device, steps: int) -> Findings:
    """Measure `step_s` over `steps` steps."""
    timer = WallTimer(device)
    with quiet():
        samples = [[timer.time(program.step)] for _ in range(steps)]
        canary = timer.finish()
    return Findings(metrics=timer.metrics("step_s", samples) | canary)
