"""Which steps are profiled in a first and in a further process, and what of them is counted. The profiler itself needs a GPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hpc_core.catalogue import catalogue
from hpc_core.instruments import kernels
from hpc_core.instruments.kernels import DeviceActivity, busy_steps, compilations
from hpc_core.record.job import Job, MeasureCeilings
from hpc_core.record.record import Metric
from hpc_core.worker.perform import perform

_GPU = torch.device("cuda", 0)


class Profiler:
    """Readings of a GPU that is not there: a step takes a tenth of a second and 100 kernels, every second one 101 unless alike."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, alike: bool = True) -> None:
        self.profiled: list[int] = []
        self._alike = alike
        monkeypatch.setattr(kernels, "device_activity", self._read)
        monkeypatch.setattr(kernels, "mark_step", lambda _: None)
        monkeypatch.setattr(kernels, "gpu_state", dict)

    def _read(self, work: Callable[[], None], device: torch.device, *, marked_steps: int = 0) -> DeviceActivity:
        steps = marked_steps or 10
        self.profiled.append(steps)
        launched = 100 * steps + (0 if self._alike else (steps + 1) // 2)
        return DeviceActivity(
            busy_s=0.1 * steps, stream_s={}, kernels=launched, copies=2 * steps, memsets=0,
            kernel_s={"nvjet_a": 0.1 * steps}, kernel_counts={"nvjet_a": launched}, synchronizations=steps,
            steps_alike=marked_steps > 0 and self._alike,
        )  # fmt: skip

    def take(self, *, short: bool, period: int = 1) -> dict[str, Metric]:
        """What `busy_steps` makes of these readings."""
        self.profiled.clear()
        program: Any = SimpleNamespace(period=period, step=lambda: None, phases=("step",))
        found = busy_steps(program, _GPU, short=short)
        assert found.metrics["busy_s"].value == pytest.approx(0.1)
        assert sum(each.kernels for each in found.kernel_families.values()) == found.metrics["kernels"].value
        return {name: each for name, each in found.metrics.items() if each.noise == "exact"}


def test_five_steps_that_are_alike_say_what_ten_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """A further process profiles half as much, and its counts are those of the first."""
    profiler = Profiler(monkeypatch)
    first, profiled = profiler.take(short=False), list(profiler.profiled)
    assert first == profiler.take(short=True)
    assert (profiled, profiler.profiled) == ([10], [5])
    assert first["kernels"].unit == "1 per 10 steps"


def test_steps_that_differ_are_all_profiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel of every second step cannot be told from five of them: ten are profiled, and none is invented."""
    profiler = Profiler(monkeypatch, alike=False)
    first = profiler.take(short=False)
    assert first == profiler.take(short=True)
    assert profiler.profiled == [5, 10]
    assert first["kernels"].value == 1005


def test_rows_of_different_widths_are_all_profiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where shapes repeat after several steps, a further process sees the same ten as the first."""
    profiler = Profiler(monkeypatch)
    profiler.take(short=True, period=7)
    assert profiler.profiled == [10]


COMPILED = """
import torch
from hpc_core.catalogue import catalogue
from tests.instruments.test_busy_steps import seen

def step(x):
    y = x + 1
    torch._dynamo.graph_break()
    return y * 2

eager = seen()
compiled = torch.compile(step, backend="eager", dynamic=False)
for rows in (1, 2, 2):
    compiled(torch.ones(rows))
print(eager, seen())
"""


def seen() -> tuple[float, float]:
    """Graph breaks and recompilations of this process."""
    found = compilations(torch.device("cpu")).metrics
    assert not any(found[name].gated for name in ("graph_breaks", "recompilations"))
    return found["graph_breaks"].value, found["recompilations"].value


@pytest.mark.slow
def test_graph_breaks_and_recompilations_are_counted() -> None:
    """None in eager code; a break in each of two shapes, and two parts compiled again for the second."""
    ran = subprocess.run(
        [sys.executable, "-c", COMPILED], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert ran.stdout.split("\n")[0] == "(0, 0) (2, 2)", ran.stderr


def test_a_canary_stands_in_the_circumstances() -> None:
    """The worker that is asked for it runs no case, and its record holds the canary's seconds."""
    record = perform(
        Job(case=catalogue()["tiny/lora"], launched="inline", kind=MeasureCeilings(canary=True)), lambda _: None
    )
    assert (record.status, record.metrics) == ("ok", {})
    assert set(record.circumstances.canary) == {"compute", "memory"}
