"""Run a case in this process, after changing its model or its program behind its back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hpc_core.builders.assemble import Built, build
from hpc_core.case.case import Case
from hpc_core.engines.finetune import finetune_program
from hpc_core.engines.generate import generate_program
from hpc_core.record.job import Job
from hpc_core.record.record import Record
from hpc_core.worker.perform import perform

Change = Callable[[Any], object]
Run = Callable[..., Record]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run(case, model=…, program=…)` measures a case whose model or program a function has changed."""

    def run_changed(case: Case, *, model: Change | None = None, program: Change | None = None) -> Record:
        if model is not None:

            def changed_build(case: Case, device: torch.device) -> Built:
                built = build(case, device)
                model(built.model)
                return built

            monkeypatch.setattr("hpc_core.worker.place.build", changed_build)
        if program is not None:
            make: Any = {"finetune": finetune_program, "generate": generate_program}[case.kind]

            def changed_program(*arguments: Any) -> Any:
                made = make(*arguments)
                program(made)
                return made

            monkeypatch.setattr(f"hpc_core.engines.{case.kind}.{case.kind}_program", changed_program)
        return perform(Job(case=case, launched="inline", device="cpu"), lambda _: None)

    return run_changed
