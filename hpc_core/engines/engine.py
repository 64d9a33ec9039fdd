"""The protocol of engines, and the lookup of the engine that a case names.

Measuring, auditing and predicting depend on an engine's methods, never on its name. A new engine is a class like those in this
folder, in a package that registers it under the entry point `hpc_core.engines`.
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
    """A loaded case that runs step by step. Generation and training have base classes in this folder."""

    phases: tuple[str, ...]
    """The phases of one step in order; the first begins with the step."""
    period: int
    """Steps after which the shapes of the data repeat: 1 if all steps have the same shapes."""
    captured: Any
    """The CUDA graph that steps replay; None if they run operator by operator."""

    def step(self, mark: Mark = unmarked) -> None:
        """Queue one unit of the work on the device; the caller synchronizes."""

    def facts(self, found: Findings | None = None) -> Findings:
        """Return what really runs, for the audit.

        Without `found`, these are facts that the program knows without a measurement; `found` holds the measurements so far.
        """

    def counters(self, found: Findings) -> Findings:
        """Return the engine's own counts, and metrics that it knows better than an instrument; `found` is what was measured."""

    def uncaptured(self) -> contextlib.AbstractContextManager[None]:
        """Run every step in the block operator by operator, so that it can be observed."""

    def close(self) -> None:
        """Release what outlives the last step: a loader's workers, a graph's memory."""


class Engine:
    """Base class of engines, with defaults. `engine_of` creates an engine without arguments."""

    name: ClassVar[str]
    """What a case writes."""
    workloads: ClassVar[frozenset[str]]
    """generate, finetune, callable."""
    own_code: ClassVar[bool] = False
    """True if its own code replaces the libraries' forwards. The audit then uses the program's own facts."""

    def missing(self, case: Case, device: torch.device) -> str | None:
        """Return one sentence that says why the engine cannot run this case here; None if it can."""
        return None

    def unpredictable(self, case: Case) -> str | None:
        """Return one or two sentences that say why the engine's case cannot be predicted; None if it can."""
        return f"{case.id}: the engine {self.name} does not say that it can run on fake tensors. Measure it on a GPU."

    def load(self, case: Case, device: torch.device, built: Built | None) -> Program:
        """Return the program of this case; `built` is its module, None for a user's own step, which builds its own."""
        raise NotImplementedError

    def restore(self, model: torch.nn.Module) -> None:
        """Put the libraries' own forwards back into the model, for comparisons with them."""


def engine_of(case: Case) -> Engine:
    """Return the engine that this case names.

    Raises:
        SpecError: no engine has that name, or it does not support the workload.
    """
    name = "callable" if isinstance(case.workload, CallableSpec) else case.workload.engine
    place = BUILT_IN[case.kind].get(name)
    if place is not None:
        module, _, attribute = place.partition(":")
        found: Any = getattr(importlib.import_module(module), attribute)
    elif name in registered():
        found = registered()[name].load()
    else:
        raise SpecError(f"{case.id}: no engine is called {name!r}. Install the package that registers it.")
    engine: Engine = found()
    if case.kind not in engine.workloads:
        raise SpecError(
            f"{case.id}: the engine {name} supports {', '.join(sorted(engine.workloads))}, but the workload is {case.kind}."
        )
    return engine
