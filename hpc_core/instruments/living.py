"""Find what a step works on when only its call is known: the models and optimizers that live in this process."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from hpc_core.instruments.owners import gradient_tensors, optimizer_tensors, owned_tensors, weight_tensors
from hpc_core.instruments.places import Places

Thing = TypeVar("Thing")
Claim = Callable[[str, Iterable[torch.Tensor]], None]
"""Assigns tensors to a category."""


def living(kind: type[Thing]) -> list[Thing]:
    """Return every object of this class that the garbage collector knows."""
    # type(), not isinstance: a lazy proxy would import its package to answer.
    things = gc.get_objects()
    kinds = {each for each in set(map(type, things)) if issubclass(each, kind)}
    return [thing for thing in things if type(thing) in kinds]


def living_models() -> list[torch.nn.Module]:
    """Return the modules that live and are no part of another one, except those that have no weights yet."""
    modules = living(torch.nn.Module)
    parts = {id(part) for module in modules for part in module._modules.values() if part is not None}
    roots = [module for module in modules if id(module) not in parts]
    return [root for root in roots if not any(map(torch.nn.parameter.is_lazy, root.parameters()))]


def trained_by(optimizer: Any) -> list[torch.Tensor]:
    """Return the tensors that an optimizer updates, without those that need no gradient."""
    return [part for group in optimizer.param_groups for part in group["params"] if part.requires_grad]


@contextlib.contextmanager
def stepping(
    before: Callable[[torch.optim.Optimizer], None], after: Callable[[torch.optim.Optimizer], None]
) -> Iterator[None]:
    """Call these before and after each step of each optimizer while the block runs."""
    handles = (
        register_optimizer_step_pre_hook(lambda optimizer, *_: before(optimizer)),
        register_optimizer_step_post_hook(lambda optimizer, *_: after(optimizer)),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def claiming(claim: Claim, name: Claim | None = None, places: Places | None = None) -> Iterator[None]:
    """Assign all weights, gradients and optimizer state to their categories while a step runs.

    Gradients are those that exist when an optimizer steps. `claim` must ignore tensors that the step does not use. With `name` and
    `places`, what belongs to modules that ran is assigned to their paths.
    """
    optimizers = {id(each): each for each in living(torch.optim.Optimizer)}

    def before(optimizer: torch.optim.Optimizer) -> None:
        claim("gradients", [part.grad for part in trained_by(optimizer) if part.grad is not None])
        after(optimizer)

    def after(optimizer: torch.optim.Optimizer) -> None:
        optimizers[id(optimizer)] = optimizer
        claim("optimizer", optimizer_tensors(optimizer))
        if name is not None and places is not None:
            _name(places, optimizers.values(), name)

    with stepping(before, after):
        yield
    for optimizer in optimizers.values():
        claim("weights", trained_by(optimizer))
        claim("optimizer", optimizer_tensors(optimizer))
    for model in living_models():
        for category, tensors in weight_tensors(model).items():
            claim(category, tensors)
        claim("gradients", gradient_tensors(model))
    if name is not None and places is not None:
        _name(places, optimizers.values(), name)


def _name(places: Places, optimizers: Iterable[torch.optim.Optimizer], name: Claim) -> None:
    """Assign what each module that ran owns to its path: weights, buffers, gradients and optimizer state."""
    for path, module in places.known():
        for part in module.parameters(recurse=False):
            states = [optimizer.state[part] for optimizer in optimizers if part in optimizer.state]
            held = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
            name(path, [*owned_tensors(part), *([] if part.grad is None else [part.grad]), *held])
        for buffer in module.buffers(recurse=False):
            name(path, owned_tensors(buffer))
