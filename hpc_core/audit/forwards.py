"""Look into forwards through module hooks: what the model was given, in which mode it ran, which graph it left.

The hooks of `watch_forwards` run no tensor operator, so that operators, kernels and bytes stay what they are. Those of
`audited_step` do, inside the `aside` that they are given: there nothing is counted, and the time is the audit's own.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from hpc_core.audit.loss import LossSeen, watch_loss
from hpc_core.audit.model import dtype_name
from hpc_core.engines.finetune import FinetuneProgram

Aside = Callable[[], contextlib.AbstractContextManager[None]]
"""What is done in the block that it gives is in no count of the pass that it interrupts."""


@dataclass
class ForwardsSeen:
    """What was seen in the forwards of a model while they were watched."""

    calls: int = 0
    first: dict[str, Any] = field(default_factory=dict)
    """The keyword arguments of the first call, by reference."""
    cache: Any = None
    """The KV cache of the last call; None where none was given."""
    modules: int = 0
    training: int = 0
    """Of `modules`, those in training mode when the last forward began."""
    autocast: set[str] = field(default_factory=set)
    """"off" or a dtype, as the model and each attention found it."""
    graph: bool = False
    """Whether some output was part of an autograd graph."""
    reentrant: bool = False
    """Whether that graph holds a reentrantly checkpointed function."""


@contextlib.contextmanager
def watch_forwards(
    model: torch.nn.Module, device_type: str, aside: Aside = contextlib.nullcontext
) -> Iterator[ForwardsSeen]:
    """Watch every call of `model` while the block runs."""
    seen = ForwardsSeen()

    def autocast(*_: object) -> None:
        on = torch.is_autocast_enabled(device_type)
        seen.autocast.add(dtype_name(torch.get_autocast_dtype(device_type)) if on else "off")

    def called(module: torch.nn.Module, _: Any, arguments: dict[str, Any]) -> None:
        autocast()
        seen.calls += 1
        seen.first = seen.first or dict(arguments)
        seen.cache = next((value for value in arguments.values() if _is_cache(value)), None)
        modes = [part.training for part in module.modules()]
        seen.modules, seen.training = len(modes), sum(modes)

    def left(_: Any, __: Any, output: Any) -> None:
        result = getattr(output, "loss", None)
        result = getattr(output, "logits", None) if result is None else result
        node = getattr(result, "grad_fn", None)
        seen.graph = seen.graph or node is not None
        with aside():
            seen.reentrant = seen.reentrant or "CheckpointFunctionBackward" in _node_names(node)

    attentions = [module for name, module in model.named_modules() if name.endswith("self_attn")]
    handles = [module.register_forward_pre_hook(autocast) for module in attentions]
    handles.append(model.register_forward_pre_hook(called, with_kwargs=True))
    handles.append(model.register_forward_hook(left))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _is_cache(value: Any) -> bool:
    return hasattr(value, "layers") and hasattr(value, "get_seq_length")


def _node_names(root: Any) -> set[str]:
    """Names of all nodes of the backward graph below `root`."""
    found, visited, waiting = set(), set(), [root]
    while waiting:
        node = waiting.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        found.add(str(node.name()))
        waiting += [below for below, _ in node.next_functions]
    return found


@dataclass
class StepSeen:
    """One training step that was looked at."""

    forwards: ForwardsSeen
    gradients: dict[str, float | None]
    """Largest absolute gradient of each trainable parameter before the optimizer's step; None where none arrived."""
    loss: LossSeen


def audited_step(program: FinetuneProgram, aside: Aside = contextlib.nullcontext) -> StepSeen:
    """Run a step on the program's widest batch, and look at it from the forward to the gradients.

    A gradient is looked at when it arrives: an optimizer inside the backward frees it at once. For any other it must still be there when that steps.
    """
    trained = {name: each for name, each in program.model.named_parameters() if each.requires_grad}
    largest: dict[str, torch.Tensor | None] = dict.fromkeys(trained)

    def look_at(name: str) -> Callable[[torch.Tensor], None]:
        def arrives(gradient: torch.Tensor) -> None:
            with aside():
                largest[name] = _largest(gradient)

        return arrives

    def mark(phase: str) -> None:
        if phase == "optimizer" and not getattr(program.optimizer, "frees_gradients", False):
            largest.update({name: None for name, each in trained.items() if each.grad is None})

    program.steps_done = program.widest
    batch = program.batches[program.widest]
    with (
        watch_forwards(program.model, batch.ids.device.type, aside) as forwards,
        watch_loss(program.model, batch.labels, aside) as loss,
        contextlib.ExitStack() as hooks,
    ):
        for name, parameter in trained.items():
            hooks.callback(parameter.register_hook(look_at(name)).remove)
        program.step(mark)
    with aside():
        loss.close()
        arrived = [value for value in largest.values() if value is not None]
        # One wait for the device, not one a parameter.
        values = iter(torch.stack(arrived).tolist() if arrived else [])
    gradients = {name: None if value is None else float(next(values)) for name, value in largest.items()}
    return StepSeen(forwards, gradients, loss)


def _largest(gradient: torch.Tensor) -> torch.Tensor:
    """The infinity norm: a reduction without a temporary of the gradient's size; NaN and infinity come through."""
    largest: torch.Tensor = torch.linalg.vector_norm(gradient.detach(), ord=math.inf, dtype=torch.float32)
    return largest


@dataclass
class LayerForwards:
    """Layers watched, and the forwards seen in them."""

    layers: int = 0
    count: int = 0


@contextlib.contextmanager
def count_layer_forwards(model: torch.nn.Module) -> Iterator[LayerForwards]:
    """Count forwards of every module whose name ends in `self_attn` while the block runs.

    The attention inside a layer is entered again when the layer is recomputed, whichever kind of checkpointing does it;
    the layer's own hooks may not be.
    """
    seen = LayerForwards()

    def entered(*_: object) -> None:
        seen.count += 1

    handles = []
    for name, module in model.named_modules():
        if name.endswith("self_attn"):
            seen.layers += 1
            handles.append(module.register_forward_pre_hook(entered))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def checkpointing_seen(forwards: int, layers: int, steps: int) -> str:
    """Say "off" for one forward a layer and step, "on" for two, a sentence for anything else."""
    per_step = layers * steps
    if layers == 0:
        return "unknown: no layer is called self_attn"
    if forwards == per_step:
        return "off"
    if forwards == 2 * per_step:
        return "on"
    return f"partly: {forwards} forwards of {layers} layers in {steps} steps"
