"""Time calls by the host's clock so that they can be judged: beside a canary, and without those that waited for a core.

The speed of a host changes from one second to the next. So a canary, work of the host that no code under test changes, runs before
and after every call, and within a long one that can be stopped. Their quotient says what the call costs on a host of any speed.
A call that the kernel kept waiting for a core does not count: where threads spin for one another, a busy neighbour makes a step a
hundred times as long.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hpc_core.instruments.clock import quiet, synchronize
from hpc_core.instruments.program import Program
from hpc_core.record.findings import Findings
from hpc_core.record.metrics import WAITED, canaries_of, metric
from hpc_core.record.record import Metric

_LAYERS = 6
"""Layers of a canary: 1 ms to 3 ms."""
_WIDTH = 64
_LEAST_SHARE = 0.05
"""The canary runs until it has taken this share of the last call's time: a short one says little about a long step."""
_MOST_RUNS = 10
_LAPS_PER_CANARY = 10
"""Within a call, a canary runs after laps that took this many times as long as it did."""
_WAITED_SHARE = 0.1
"""A call that waited longer for a core than this share of its time does not count."""


class _Norm(torch.nn.Module):
    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        normed: torch.Tensor = weight * (x * torch.rsqrt(variance + 1e-6)).to(x.dtype)
        return normed


class _Layer(torch.nn.Module):
    """What a decoder layer asks of its host: modules, views, and small operators of many kinds.

    A loop over one operator follows a slower host worse: a token's wall time in units of such a loop differed by 8 % between ten
    processes on one H200 host, in units of this by 1 % (bench/studies/error_rates). There is no matrix product: cuBLAS would
    keep a workspace on the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = _Norm(), torch.nn.SiLU()

    def forward(self, x: torch.Tensor, *, weight: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x, weight=weight)
        heads = (normed.unsqueeze(-1) * square).sum(-2).view(1, -1, 4, _WIDTH // 4).transpose(1, 2)
        half = _WIDTH // 8
        heads = heads + torch.cat((-heads[..., half:], heads[..., :half]), dim=-1)
        out = heads.transpose(1, 2).reshape(1, -1, _WIDTH)
        added: torch.Tensor = x + (self.act(out).unsqueeze(-1) * square).sum(-2) * normed
        return added


@dataclass(frozen=True)
class _Run:
    """One timed run."""

    seconds: float
    waited_s: float
    """For a core, while ready to run."""


@dataclass(frozen=True)
class _Lap:
    """A part of a call."""

    run: _Run
    canary: int
    """Index of the canary before it; the next one came after it."""


class WallTimer:
    """Times calls, and laps of a call, beside a canary: small operators, which on a GPU launch as many kernels.

    That is what a model that waits for its host mostly does. The canary's memory is free again before a timed call goes on.
    """

    def __init__(self, device: torch.device):
        """Run the canary once, so that nothing is run for the first time when it counts."""
        self._device = device
        self._layers = [_Layer() for _ in range(_LAYERS)]
        self._canaries: list[_Run] = []
        self._calls: list[list[_Lap]] = []
        self._since_s = 0.0
        """Seconds of laps since the last canary."""
        self._start = (0.0, 0.0)
        self._canary()

    def time(self, call: Callable[[], None]) -> float:
        """Run the canary, then the call; return the call's seconds, from an idle device to an idle device."""
        last = sum(lap.run.seconds for lap in self._calls[-1]) if self._calls else 0.0
        self._add_canary(least_s=_LEAST_SHARE * last)
        self._calls.append([])
        self._begin()
        call()
        self._end()
        return sum(lap.run.seconds for lap in self._calls[-1])

    def lap(self) -> None:
        """End a lap of the running call and begin the next one; a canary that runs in between is in neither."""
        self._end()
        if self._since_s > _LAPS_PER_CANARY * self._canaries[-1].seconds:
            self._add_canary()
        self._begin()

    def finish(self) -> dict[str, Metric]:
        """Run the canary a last time, and return its median as `host_canary_s`."""
        self._add_canary()
        return {"host_canary_s": metric("host_canary_s", statistics.median(run.seconds for run in self._canaries))}

    def metrics(self, name: str, laps: slice = slice(None), *, whole: bool = True) -> dict[str, Metric]:
        """Return a wall time and its quotient to the canary: medians over what did not wait for a core.

        If more than half waited, the time is shown and not judged.

        Args:
            name: of the wall time.
            laps: which of each call's laps count.
            whole: whether a call's laps are one time; otherwise each is a time of its own.

        Raises:
            ValueError: `finish` was not called, or there are no such laps.
        """
        chosen = [call[laps] for call in self._calls]
        parts = chosen if whole else [[lap] for call in chosen for lap in call]
        times = [self._quotient(part) for part in parts]
        every = [seconds for seconds, _, _ in times]
        disturbed = [share > _WAITED_SHARE for _, _, share in times]
        counted = [each for each, left_out in zip(times, disturbed, strict=True) if not left_out] or times
        count = sum(disturbed)
        return {
            name: metric(
                name,
                statistics.median(seconds for seconds, _, _ in counted),
                samples=every,
                note=f"{count} of {len(times)} {WAITED}" if count else None,
                gated=False if 2 * count > len(times) else None,
            ),
            canaries_of(name): metric(
                canaries_of(name), samples=[statistics.median(in_canaries for _, in_canaries, _ in counted)]
            ),
        }

    def _quotient(self, laps: Sequence[_Lap]) -> tuple[float, float, float]:
        """Return the seconds of laps, the same in canaries, and the share of the time, canaries included, that waited for a core."""
        seconds = in_canaries = waited_s = beside_s = 0.0
        for lap in laps:
            try:
                around = self._canaries[lap.canary], self._canaries[lap.canary + 1]
            except IndexError:
                raise ValueError("A time needs a canary after it: call finish().") from None
            seconds += lap.run.seconds
            in_canaries += lap.run.seconds / statistics.fmean(run.seconds for run in around)
            waited_s += lap.run.waited_s + sum(run.waited_s for run in around)
            beside_s += lap.run.seconds + sum(run.seconds for run in around)
        return seconds, in_canaries, waited_s / beside_s

    def _add_canary(self, least_s: float = 0.0) -> None:
        runs = [self._canary()]
        while sum(run.seconds for run in runs) < least_s and len(runs) < _MOST_RUNS:
            runs.append(self._canary())
        self._canaries.append(
            _Run(
                statistics.fmean(run.seconds for run in runs),
                statistics.fmean(run.waited_s for run in runs),
            )
        )
        self._since_s = 0.0

    def _canary(self) -> _Run:
        self._begin()
        with torch.no_grad():
            x = torch.zeros(1, 1, _WIDTH, device=self._device)
            weight = torch.ones(_WIDTH, device=self._device)
            square = torch.ones(_WIDTH, _WIDTH, device=self._device)
            for layer in self._layers:
                x = layer(x, weight=weight, square=square)
        return self._stop()

    def _begin(self) -> None:
        synchronize(self._device)
        self._start = (_waited_s(), time.perf_counter())

    def _stop(self) -> _Run:
        synchronize(self._device)
        waited_s, start = self._start
        seconds = time.perf_counter() - start
        return _Run(seconds, _waited_s() - waited_s)

    def _end(self) -> None:
        run = self._stop()
        self._calls[-1].append(_Lap(run, len(self._canaries) - 1))
        self._since_s += run.seconds


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
        for _ in range(steps):
            timer.time(program.step)
        canary = timer.finish()
    return Findings(metrics=timer.metrics("step_s") | canary)
