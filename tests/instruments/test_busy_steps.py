"""Which steps are profiled, and what is counted. The profiler itself needs a GPU."""

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
from hpc_core.instruments.compilations import Compilations
from hpc_core.instruments.kernels import DeviceActivity, busy_steps
from hpc_core.record.job import Job, MeasureCeilings
from hpc_core.record.record import Metric
from hpc_core.worker.perform import perform

_GPU = torch.device("cuda", 0)


class Profiler:
    """Readings of an imaginary GPU: a step takes 0.1 s and 100 kernels; unless `alike`, every second step takes 101."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, alike: bool = True) -> None:
        self.profiled: list[int] = []
        self._alike = alike
        monkeypatch.setattr(kernels, "device_activity", self._read)
        monkeypatch.setattr(kernels, "mark_step", lambda _: None)
        monkeypatch.setattr(kernels, "gpu_state", dict)

    def _read(
        self, work: Callable[[], None], device: torch.device, *, marked_steps: int = 0, watch: object
    ) -> DeviceActivity:
        steps = marked_steps or 10
        self.profiled.append(steps)
        launched = 100 * steps + (0 if self._alike else (steps + 1) // 2)
        return DeviceActivity(
            busy_s=0.1 * steps, stream_s={}, kernels=launched, copies=2 * steps, memsets=0,
            kernel_s={"nvjet_a": 0.1 * steps}, kernel_counts={"nvjet_a": launched}, synchronizations=steps,
            steps_alike=marked_steps > 0 and self._alike,
        )  # fmt: skip

    def take(self, *, period: int = 1) -> dict[str, Metric]:
        """The exact metrics that `busy_steps` makes of the readings."""
        self.profiled.clear()
        program: Any = SimpleNamespace(period=period, step=lambda: None, phases=("step",))
        findings = busy_steps(program, _GPU)
        assert findings.metrics["busy_s"].value == pytest.approx(0.1)
        assert sum(each.kernels for each in findings.kernel_families.values()) == findings.metrics["kernels"].value
        return {name: each for name, each in findings.metrics.items() if each.noise == "exact"}


def test_five_equal_steps_count_like_ten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five steps that are alike count twice: as much as ten steps of another period."""
    profiler = Profiler(monkeypatch)
    five, profiled = profiler.take(), list(profiler.profiled)
    assert five == profiler.take(period=7)
    assert (profiled, profiler.profiled) == ([5], [10])
    assert five["kernels"].unit == "1 per 10 steps"


def test_ten_steps_are_profiled_if_they_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that differ are profiled again, ten of them."""
    profiler = Profiler(monkeypatch, alike=False)
    assert profiler.take()["kernels"].value == 1005
    assert profiler.profiled == [5, 10]


COMPILED = """
import torch
from hpc_core.catalogue import catalogue
from tests.instruments.test_busy_steps import counted

def step(x):
    y = x + 1
    torch._dynamo.graph_break()
    return y * 2

eager = counted()
compiled = torch.compile(step, backend="eager", dynamic=False)
for rows in (1, 2, 2):
    compiled(torch.ones(rows))
print(eager, counted())
"""


def counted() -> tuple[float, float]:
    """Graph breaks and recompilations of this process."""
    metrics = Compilations().findings(torch.device("cpu")).metrics
    assert not any(metrics[name].gated for name in ("graph_breaks", "recompilations"))
    return metrics["graph_breaks"].value, metrics["recompilations"].value


@pytest.mark.slow
def test_graph_breaks_and_recompilations_are_counted() -> None:
    """Eager code has none; one break in each of two shapes gives two breaks and two recompilations."""
    result = subprocess.run(
        [sys.executable, "-c", COMPILED], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert result.stdout.split("\n")[0] == "(0, 0) (2, 2)", result.stderr


def test_a_canary_job_records_its_seconds() -> None:
    """A canary job runs no case; its record holds the canary's seconds."""
    record = perform(
        Job(case=catalogue()["tiny/lora"], launched="inline", kind=MeasureCeilings(canary=True)), lambda _: None
    )
    assert (record.status, record.metrics) == ("ok", {})
    assert set(record.circumstances.canary) == {"compute", "memory"}
