"""Observe forward passes through module hooks: the model's inputs, its mode, and the autograd graph that it built.

The hooks of `watch_forwards` run no tensor operators, so they do not change counts of operators, kernels or bytes. Those of
`audited_step` do, inside an `uncounted` block: no counter sees it, and its time is reported as the audit's.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from hpc_core.audit.loss import LossCheck, Uncounted, watch_loss
from hpc_core.audit.model import dtype_name
from hpc_core.audit.parts import attention_modules, decoder_layers
from hpc_core.engines.finetune import FinetuneProgram


@dataclass
class Forwards:
    """What was observed in the forward passes of a model."""

    calls: int = 0
    first: dict[str, Any] = field(default_factory=dict)
    """The keyword arguments of the first call, by reference."""
    cache: Any = None
    """The KV cache of the last call; None if that call had none."""
    modules: int = 0
    training: int = 0
    """How many of `modules` were in training mode when the last forward began."""
    autocast: set[str] = field(default_factory=set)
    """"off" or a dtype, read when the model and each attention module were called."""
    graph: bool = False
    """True if any output requires a backward pass."""
    reentrant: bool = False
    """True if reentrant checkpointing was used."""


@contextlib.contextmanager
def watch_forwards(
    model: torch.nn.Module, device_type: str, uncounted: Uncounted = contextlib.nullcontext
) -> Iterator[Forwards]:
    """Observe every call of `model` while the block runs."""
    forwards = Forwards()

    def read_autocast(*_: object) -> None:
        on = torch.is_autocast_enabled(device_type)
        forwards.autocast.add(dtype_name(torch.get_autocast_dtype(device_type)) if on else "off")

    def before_forward(module: torch.nn.Module, _: Any, arguments: dict[str, Any]) -> None:
        read_autocast()
        forwards.calls += 1
        forwards.first = forwards.first or dict(arguments)
        forwards.cache = next((value for value in arguments.values() if _is_cache(value)), None)
        modes = [part.training for part in module.modules()]
        forwards.modules, forwards.training = len(modes), sum(modes)

    def after_forward(_: Any, __: Any, output: Any) -> None:
        result = getattr(output, "loss", None)
        result = getattr(output, "logits", None) if result is None else result
        node = getattr(result, "grad_fn", None)
        forwards.graph = forwards.graph or node is not None
        with uncounted():
            forwards.reentrant = forwards.reentrant or "CheckpointFunctionBackward" in _node_names(node)

    handles = [module.register_forward_pre_hook(read_autocast) for module in attention_modules(model)]
    handles.append(model.register_forward_pre_hook(before_forward, with_kwargs=True))
    handles.append(model.register_forward_hook(after_forward))
    try:
        yield forwards
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
class AuditedStep:
    """What was observed in one training step."""

    forwards: Forwards
    gradients: dict[str, float | None]
    """Largest absolute gradient of each trainable parameter before the optimizer's step; None if it received none."""
    loss: LossCheck


def audited_step(program: FinetuneProgram, uncounted: Uncounted = contextlib.nullcontext) -> AuditedStep:
    """Run one step on the program's widest batch and observe its forward pass, its loss and its gradients.

    Each gradient is read when it is computed, because an optimizer that runs inside the backward pass frees it at once. With
    any other optimizer, the gradient must still exist when the optimizer steps.
    """
    trained = {name: each for name, each in program.model.named_parameters() if each.requires_grad}
    largest: dict[str, torch.Tensor | None] = dict.fromkeys(trained)

    def gradient_hook(name: str) -> Callable[[torch.Tensor], None]:
        def read(gradient: torch.Tensor) -> None:
            with uncounted():
                largest[name] = largest_of(gradient)

        return read

    def mark(phase: str) -> None:
        if phase == "optimizer" and not getattr(program.optimizer, "frees_gradients", False):
            largest.update({name: None for name, each in trained.items() if each.grad is None})

    program.steps_done = program.widest
    batch = program.batches[program.widest]
    with (
        watch_forwards(program.model, batch.ids.device.type, uncounted) as forwards,
        watch_loss(program.model, batch.labels, uncounted) as loss,
        contextlib.ExitStack() as hooks,
    ):
        for name, parameter in trained.items():
            hooks.callback(parameter.register_hook(gradient_hook(name)).remove)
        program.step(mark)
    with uncounted():
        loss.close()
        received = [value for value in largest.values() if value is not None]
        # Synchronize once, not once per parameter.
        values = iter(torch.stack(received).tolist() if received else [])
    gradients = {name: None if value is None else float(next(values)) for name, value in largest.items()}
    return AuditedStep(forwards, gradients, loss)


def largest_of(gradient: torch.Tensor) -> torch.Tensor:
    """Return the infinity norm, which needs no temporary of the gradient's size and propagates NaN and infinity."""
    largest: torch.Tensor = torch.linalg.vector_norm(gradient.detach(), ord=math.inf, dtype=torch.float32)
    return largest


class LayerForwards:
    """The number of layers, and of forward passes through them."""

    def __init__(self, layers: int = 0):
        self.layers = layers
        self._calls: list[Counter[int]] = [Counter() for _ in range(layers)]

    @property
    def count(self) -> int:
        """Forward passes of all layers: calls of each layer's attention, or of the part that it calls first."""
        return sum(next(iter(calls.values()), 0) for calls in self._calls)

    def called(self, layer: int, part: int) -> None:
        """Record a call of a layer's part."""
        self._calls[layer][part] += 1


@contextlib.contextmanager
def count_layer_forwards(model: torch.nn.Module) -> Iterator[LayerForwards]:
    """Count forward passes of every decoder layer while the block runs.

    Both kinds of checkpointing call a layer's parts again when they recompute it; the layer's own hooks may not run then.
    """
    layers = decoder_layers(model)
    forwards = LayerForwards(len(layers))
    handles = []
    for index, layer in enumerate(layers):
        for part, module in enumerate(attention_modules(layer)[:1] or layer.children()):
            call = functools.partial(forwards.called, index, part)
            handles.append(module.register_forward_pre_hook(lambda *_, call=call: call()))
    try:
        yield forwards
    finally:
        for handle in handles:
            handle.remove()


def checkpointing_state(forwards: int, layers: int, steps: int) -> str | None:
    """Return "off" for one forward per layer and step, "on" for two, a description otherwise, and None without a layer."""
    per_step = layers * steps
    if layers == 0:
        return None
    if forwards == per_step:
        return "off"
    if forwards == 2 * per_step:
        return "on"
    return f"partly: {forwards} forwards of {layers} layers in {steps} steps"
