"""What an engine is, and how the one that a case names is found.

A case names its engine; measuring, auditing and predicting ask it for what differs, and never for its name. A new engine is a
class like those in this folder, in a package that registers it under the entry point `hpc_core.engines`.
"""

from __future__ import annotations

import contextlib
import importlib
from typing import Any, ClassVar, Protocol

import torch

from hpc_core.builders.assemble import Built
from hpc_core.case.case import Case
from hpc_core.case.engines import BUILT_IN, registered
from hpc_core.case.errors import SpecError
from hpc_core.case.workloads import CallableSpec
from hpc_core.instruments.program import Mark, unmarked
from hpc_core.record.findings import Findings


class Program(Protocol):
    """A case, loaded by its engine, that runs step by step. Generation and training have base classes for it in this folder."""

    phases: tuple[str, ...]
    """The phases of one step in order; the first begins with the step."""
    period: int
    """Steps after which the shapes of the data repeat: 1 when every step has the same."""
    captured: Any
    """The CUDA graph that steps replay; None where they run operator by operator."""

    def step(self, mark: Mark = unmarked) -> None:
        """One unit of the work, queued on the device; the caller synchronizes."""

    def facts(self, found: Findings | None = None) -> Findings:
        """Return what really runs, for the audit.

        Without `found`, only what the program knows by itself; with what was measured so far, also what that shows.
        """

    def counters(self, found: Findings) -> Findings:
        """Return the engine's own counts, and metrics that it knows better than an instrument; `found` is what was measured."""

    def uncaptured(self) -> contextlib.AbstractContextManager[None]:
        """Run every step in the block operator by operator, so that it can be watched."""

    def close(self) -> None:
        """Let go of what outlives the last step: a loader's workers, a graph's memory."""


class Engine:
    """Base of every engine, with the answers of one that has nothing special. `engine_of` makes it without arguments."""

    name: ClassVar[str]
    """What a case writes."""
    workloads: ClassVar[frozenset[str]]
    """generate, finetune, callable."""
    own_code: ClassVar[bool] = False
    """Whether its own code runs in place of the libraries' forwards. The audit then takes the program's word for what ran."""

    def missing(self, case: Case, device: torch.device) -> str | None:
        """Return why it cannot run this case here, in one sentence; None if it can."""
        return None

    def unpredictable(self, case: Case) -> str | None:
        """Return why a case cannot be predicted with it, in one sentence or two; None if it can."""
        return f"{case.id}: the engine {self.name} does not say that it can run on fake tensors. Measure it on a GPU."

    def load(self, case: Case, device: torch.device, built: Built | None) -> Program:
        """Return the program of this case; `built` is its module, None for a step of the user's own, which builds itself."""
        raise NotImplementedError

    def restore(self, model: torch.nn.Module) -> None:
        """Put the libraries' own forwards back into the model, for what is compared with them."""


def engine_of(case: Case) -> Engine:
    """Return the engine that this case names.

    Raises:
        SpecError: there is none of that name, or it does not know the workload.
    """
    name = "callable" if isinstance(case.workload, CallableSpec) else case.workload.engine
    place = BUILT_IN[case.kind].get(name)
    if place is not None:
        module, _, attribute = place.partition(":")
        found: Any = getattr(importlib.import_module(module), attribute)
    elif name in registered():
        found = registered()[name].load()
    else:
        raise SpecError(f"{case.id}: there is no engine {name!r} here. Install the package that registers it.")
    engine: Engine = found()
    if case.kind not in engine.workloads:
        raise SpecError(
            f"{case.id}: the engine {name} knows {', '.join(sorted(engine.workloads))}, and the workload is {case.kind}."
        )
    return engine
