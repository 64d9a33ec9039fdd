"""The profile of a case: one unit of its work with each piece of memory, operator and kernel laid at a module's door.

Runs after everything that is gated, in passes of its own. What goes wrong here costs the profile, never the record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch

from hpc_core.engines.generate import GenerateProgram
from hpc_core.instruments.allocations import StorageWatch
from hpc_core.instruments.attribution import kernel_uses
from hpc_core.instruments.clock import quiet, synchronize
from hpc_core.instruments.owners import (
    by_module,
    cache_tensors,
    optimizer_tensors,
    weight_tensors,
)
from hpc_core.instruments.places import Places, following
from hpc_core.instruments.program import Mark, Program
from hpc_core.instruments.timeline import Timeline
from hpc_core.record.profile import OperatorUse, Profile
from hpc_core.worker.memory import Fixed, claim_before
from hpc_core.worker.observe import watch_cache
from hpc_core.worker.session import Session

__all__ = ["Owning", "note_profile", "note_query_profile", "profile_of"]

_PROFILED_TOKENS = 4
"""Decoded tokens that are taken apart by module."""


class Owning(Protocol):
    """A watch that can be told whose a tensor is."""

    def own(self, category: str, tensors: Iterable[torch.Tensor]) -> None:
        """Say in which category these tensors are."""

    def name(self, module: str, tensors: Iterable[torch.Tensor]) -> None:
        """Say which module they belong to."""

    def __call__(self, phase: str) -> None:
        """A phase begins."""


def note_profile(
    session: Session,
    program: Program,
    work: str,
    *,
    model: torch.nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    marking: Callable[[Owning], Mark] | None = None,
) -> None:
    """Take one step of `program` apart, into the session's profile; `work` says what the step is.

    `marking` may wrap the watch, to name owners that live for a while. What cannot be taken apart leaves a note.
    """
    if not session.options.profile:
        return
    session.note_process_memory()
    session.phase("profile")
    try:
        with following() as places:
            session.profile = _taken_apart(session, program, work, places, model, optimizer, marking)
    # Everything that is gated has been measured by now, and an explanation is worth none of it: code under test that cannot be
    # followed, or a card without room for it, is told in a note.
    except Exception as error:
        session.notes.append(
            f"no profile: {type(error).__name__}: {(str(error).strip() or 'it said nothing').splitlines()[0]}"
        )


def note_query_profile(session: Session, program: GenerateProgram, longest: int) -> None:
    """Take a short query apart: the prompt at this index and a few tokens after it, with the cache's owner named at each token."""
    tokens, program.new_tokens = program.new_tokens, min(1 + _PROFILED_TOKENS, program.new_tokens)
    with watch_cache(program.model) as cache:

        def marking(watch: Owning) -> Mark:
            program.on_token = lambda _: watch.own("kv_cache", cache_tensors(cache.seen))
            return watch

        work = f"the longest prompt and {program.new_tokens} tokens"
        note_profile(session, Fixed(program, longest), work, model=program.model, marking=marking)
    program.on_token, program.new_tokens = None, tokens


def _taken_apart(
    session: Session,
    program: Program,
    work: str,
    places: Places,
    model: torch.nn.Module | None,
    optimizer: torch.optim.Optimizer | None,
    marking: Callable[[Owning], Mark] | None,
) -> Profile:
    if model is not None:
        places.learn(model)
    owners = weight_tensors(model) if model is not None else {}
    if optimizer is not None:
        owners["optimizer"] = optimizer_tensors(optimizer)
    watch = StorageWatch(program.phases)
    watch.place = places.here
    mark: Mark = watch if marking is None else marking(watch)
    with quiet(young=True):
        claim_before(session, watch, owners)
        for module, tensors in by_module(model, optimizer):
            watch.name(module, tensors)
        places.begin()
        with watch:
            program.step(mark)
        synchronize(session.device)
        found = profile_of(work, program.phases, watch.timeline, watch.uses, places)
    if not session.on_gpu:
        return found
    kernels = kernel_uses(program.step, session.device, places.here)
    return Profile(
        work=found.work,
        phases=found.phases,
        modules=found.modules,
        at_peak=found.at_peak,
        operators=found.operators,
        kernels=kernels,
    )


def profile_of(
    work: str,
    phases: Iterable[str],
    timeline: Timeline,
    uses: dict[tuple[str, str, str], int],
    places: Places,
) -> Profile:
    """The profile of what a watch saw."""
    names = tuple(phases)
    most = sorted(uses.items(), key=lambda each: (-each[1], each[0]))
    return Profile(
        work=work,
        phases=names,
        modules=places.seen(),
        at_peak=timeline.pieces_at_peak(names),
        operators=tuple(OperatorUse(*key, times) for key, times in most),
    )
