"""Which steps are profiled in a first and in a further process, and what of them is counted. The profiler itself needs a GPU."""

from __future__ import annotations

import datetime
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hpc_core.catalogue import catalogue
from hpc_core.instruments.kernels import DeviceActivity
from hpc_core.record.job import Job, Measure, MeasureCeilings, Repeat
from hpc_core.worker.perform import perform
from hpc_core.worker.profiled import note_compilations, profile_steps
from hpc_core.worker.session import Session


class Profiler:
    """A session on a GPU that launches nothing: a step takes a tenth of a second and 100 kernels, every second one 101."""

    def __init__(self, *, replicate: bool, alike: bool = True) -> None:
        self.kind = Repeat() if replicate else Measure()
        self.on_gpu = True
        self.device = None
        self.metrics: dict[str, Any] = {}
        self.kernel_families: dict[str, Any] = {}
        self.profiled: list[int] = []
        self._alike = alike

    def phase(self, name: str) -> None:
        """A phase begins."""

    def busy(self, work: Callable[[], None], *, marked_steps: int = 0) -> DeviceActivity:
        """A reading over the marked steps, or over ten."""
        steps = marked_steps or 10
        self.profiled.append(steps)
        kernels = 100 * steps + (0 if self._alike else (steps + 1) // 2)
        return DeviceActivity(
            busy_s=0.1 * steps, stream_s={}, kernels=kernels, copies=2 * steps, memsets=0,
            kernel_s={"nvjet_a": 0.1 * steps}, kernel_counts={"nvjet_a": kernels}, synchronizations=steps,
            steps_alike=marked_steps > 0 and self._alike,
        )  # fmt: skip


def profiled(session: Profiler, *, period: int = 1) -> dict[str, float]:
    """What `profile_steps` makes of these readings."""
    program: Any = SimpleNamespace(period=period, step=lambda: None, phases=("step",))
    seconds = profile_steps(session, program)  # type: ignore[arg-type]
    assert seconds == pytest.approx(0.1)
    assert sum(each.kernels for each in session.kernel_families.values()) == session.metrics["kernels"].value
    return {name: metric.value for name, metric in session.metrics.items() if metric.noise == "exact"}


def test_five_steps_that_are_alike_say_what_ten_say() -> None:
    """A further process profiles half as much, and its counts are those of the first."""
    first, further = Profiler(replicate=False), Profiler(replicate=True)
    assert profiled(first) == profiled(further)
    assert (first.profiled, further.profiled) == ([10], [5])
    assert first.metrics["kernels"].unit == further.metrics["kernels"].unit == "1 per 10 steps"


def test_steps_that_differ_are_all_profiled() -> None:
    """A kernel of every second step cannot be told from five of them: ten are profiled, and none is invented."""
    first, further = Profiler(replicate=False, alike=False), Profiler(replicate=True, alike=False)
    assert profiled(first) == profiled(further)
    assert further.profiled == [5, 10]
    assert first.metrics["kernels"].value == 1005


def test_rows_of_different_widths_are_all_profiled() -> None:
    """Where shapes repeat after several steps, a further process sees the same ten as the first."""
    further = Profiler(replicate=True)
    profiled(further, period=7)
    assert further.profiled == [10]


COMPILED = """
import torch
from hpc_core.catalogue import catalogue
from tests.worker.test_profiled import compilations

def step(x):
    y = x + 1
    torch._dynamo.graph_break()
    return y * 2

eager = compilations()
compiled = torch.compile(step, backend="eager", dynamic=False)
for rows in (1, 2, 2):
    compiled(torch.ones(rows))
print(eager, compilations())
"""


def compilations() -> tuple[float, float]:
    """Graph breaks and recompilations of this process."""
    session = Session(
        Job(case=catalogue()["tiny/lora"], launched="inline"), lambda _: None,
        started=datetime.datetime.now(datetime.UTC), began=0.0,
    )  # fmt: skip
    note_compilations(session)
    assert not any(session.metrics[name].gated for name in ("graph_breaks", "recompilations"))
    return session.metrics["graph_breaks"].value, session.metrics["recompilations"].value


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
