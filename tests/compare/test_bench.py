"""The jobs that an A/B sends to its workers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc_core.case.case import Case
from hpc_core.case.workloads import CallableSpec
from hpc_core.catalogue import catalogue
from hpc_core.compare import bench
from hpc_core.compare.bench import Bench
from hpc_core.compare.sides import side_of
from hpc_core.engines.engine import engine_of
from hpc_core.instruments.instrument import Phases
from hpc_core.record.job import Job, Kind, Measure, Retime
from hpc_core.record.record import Record
from hpc_core.worker.callable import OwnStep
from hpc_core.worker.finetune import Training
from hpc_core.worker.generate import Generation
from hpc_core.worker.place import Place
from tests.strategies import a_record

OWN = Case(id="own/quiet", scale="tiny", workload=CallableSpec(factory="tests.launch.launch_factories:quiet"))


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Kind]:
    """The kinds of the jobs that launchers were given; nothing is launched."""
    kinds: list[Kind] = []

    class RecordingLauncher:
        def __init__(self, *_: object, **__: object) -> None:
            """Launch nothing."""

        def run(self, job: Job) -> Record:
            kinds.append(job.kind)
            return a_record(case=job.case)

    monkeypatch.setattr(bench, "Launcher", RecordingLauncher)
    return kinds


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "workload_of"),
    [(catalogue()["tiny/lora"], Training), (catalogue()["tiny/generate-bf16"], Generation), (OWN, OwnStep)],
    ids=lambda value: value.id if isinstance(value, Case) else "",
)
def test_an_ab_takes_no_energy_measurement(
    case: Case, workload_of: Callable[[Place], Any], sent: list[Kind], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a GPU a run measures energy, but neither the first pair of an A/B does, nor a further one."""
    side = side_of("base", label="here", place=tmp_path, here=tmp_path, scratch=tmp_path)
    both = Bench(side, side, [case])
    both.run("base", case)
    both.run("head", case, again=True)
    first, further = sent
    assert isinstance(first, Measure)
    assert isinstance(further, Retime)

    place = Place(case, engine_of(case), torch.device("cpu"), Phases(lambda _: None, 0.0), 0.0, {}, {}, faulty=False)
    workload = workload_of(place)
    monkeypatch.setattr(Place, "on_gpu", True)
    assert "energy" in [instrument.name for instrument in workload.full(Measure())]
    assert "energy" not in [instrument.name for instrument in (*workload.full(first), *workload.retime())]
