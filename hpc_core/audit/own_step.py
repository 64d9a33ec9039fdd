"""Facts of a step of the user's own: what its optimizers train gets gradients and moves, its losses are finite and change.

No case says what was asked. What a step trains is found by the optimizers that step in it; a step without one trains nothing and has no
such facts. A backward pass is known by torch's own function, whose arguments are the losses.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import _disable_current_modes

from hpc_core.audit.forwards import largest_of
from hpc_core.instruments.growth import CALLS, GrowthWatch
from hpc_core.instruments.living import living, living_models, stepping, trained_by
from hpc_core.instruments.owners import owned_tensors
from hpc_core.record.findings import Findings
from hpc_core.record.record import Fact

_MOST_CALLS = 16
"""A step that accumulates gradients is called this often, in the hope of an optimizer's step."""
_MOST_LOOKS = 4
"""Steps of one optimizer whose gradients are read. LoRA's A has none in the first one, while B is zero."""
_LEAST_LOSSES = 6
"""Fewer losses that are all equal prove nothing."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Gradients:
    """The largest absolute gradient that each tensor got, over several steps of its optimizer."""

    def __init__(self) -> None:
        self._largest: dict[int, float | None] = {}
        self._tensors: dict[int, torch.Tensor] = {}

    def look(self, tensors: Iterable[torch.Tensor]) -> None:
        """Read the gradients that these tensors have now. Waits for the device once."""
        trained = list(tensors)
        with torch.no_grad():
            found = [(id(each), largest_of(_values(each.grad)).cpu()) for each in trained if each.grad is not None]
        values = {key: float(value) for key, value in found}
        for each in trained:
            self._tensors[id(each)] = each
            self._largest[id(each)] = _better(self._largest.get(id(each)), values.get(id(each)))

    @property
    def reached(self) -> bool:
        """Whether any tensor had a gradient; an optimizer that runs inside the backward pass leaves none to read."""
        return any(each is not None for each in self._largest.values())

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors that were looked at."""
        return list(self._tensors.values())

    def fact(self, names: Mapping[int, str]) -> Fact:
        """Return how many were reached by a gradient that is finite and not zero, and the first that was not. Float16 may underflow."""
        wrong = {}
        for key, largest in self._largest.items():
            if largest is None:
                wrong[key] = "has none"
            elif not math.isfinite(largest):
                wrong[key] = "is not finite"
            elif largest == 0 and self._tensors[key].dtype != torch.float16:
                wrong[key] = "is zero"
        count = len(self._largest)
        first = "".join(
            f"; {names.get(key, _unnamed(self._tensors[key]))} {what}" for key, what in [*wrong.items()][:1]
        )
        return Fact(asked=f"{count} of {count} reached", seen=f"{count - len(wrong)} of {count} reached{first}")


def _values(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.coalesce().values() if gradient.layout == torch.sparse_coo else gradient


def _better(one: float | None, other: float | None) -> float | None:
    """Return the gradient that shows more: a number above 0, else zero, else one that is not finite, else none."""
    return max(one, other, key=lambda each: (each is not None, each is not None and math.isfinite(each), each or 0.0))


def _unnamed(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def names_of_living() -> dict[int, str]:
    """Return the names of the parameters of every model that lives in this process, by id."""
    return {id(part): name for model in living_models() for name, part in model.named_parameters()}


def digests(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Return the sum of the bits of each tensor, by id: another one if it moved. Makes no copy."""
    found = {}
    for each in tensors:
        parts = [part for part in owned_tensors(each) if part.element_size() in _BITS and part.numel()]
        with torch.no_grad():
            found[id(each)] = sum(
                int(part.detach().view(_BITS[part.element_size()]).sum(dtype=torch.int64)) for part in parts
            )
    return found


@dataclass
class OwnTraining:
    """What is observed of a step's training, from its first call on."""

    losses: list[float] = field(default_factory=list)
    _before: dict[int, int] = field(default_factory=dict)
    _roots: list[torch.Tensor] = field(default_factory=list)
    _gradients: Gradients = field(default_factory=Gradients)
    _looks: dict[int, int] = field(default_factory=dict)
    _rates: dict[int, list[float]] = field(default_factory=dict)
    _was_scheduled: bool = False
    _is_exact: bool = True
    """Whether every loss is float32 or wider."""

    def begin(self) -> None:
        """Note the values of what the optimizers that live now train."""
        self._before = digests(part for each in living(torch.optim.Optimizer) for part in trained_by(each))

    def after_call(self) -> None:
        """Read the losses of a call. Waits for the device."""
        self.losses += [float(root) for root in self._roots]
        self._is_exact = self._is_exact and all(root.dtype in (torch.float32, torch.float64) for root in self._roots)
        self._roots.clear()

    @contextlib.contextmanager
    def watching_losses(self) -> Iterator[None]:
        """Note what each backward pass starts from, in the block."""
        original, inside = torch.autograd.backward, False

        def backward(tensors: Any, *arguments: Any, **named: Any) -> Any:
            nonlocal inside
            if inside:  # reentrant checkpointing, which continues one
                return original(tensors, *arguments, **named)
            roots = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
            self._roots += [root.detach() for root in roots if root.numel() == 1 and root.is_floating_point()]
            inside = True
            try:
                return original(tensors, *arguments, **named)
            finally:
                inside = False

        with mock.patch.object(torch.autograd, "backward", backward):
            yield

    def observe(self, call: Callable[[], None], device: torch.device) -> Findings:
        """Call the step a few times, and return facts of its training and why its memory grows, if it does."""
        watch, earlier, calls = GrowthWatch(device), len(self.losses), 0
        with self.watching_losses(), stepping(self._before_step, _nothing):
            while calls < CALLS or (calls < _MOST_CALLS and len(self.losses) > earlier and not self._looks):
                watch.run(lambda: self._call(call))
                calls += 1
        grows = watch.reason()
        found = Findings(losses=tuple(self.losses), reasons=() if grows is None else (f"{grows}.",))
        if self._looks:
            return found | Findings(facts=self._facts() | self._losses(changing=True))
        if len(self.losses) == earlier or not living(torch.optim.Optimizer):
            return found  # it trains nothing
        note = f"no optimizer stepped in {calls} calls, so gradients and weights were not audited"
        return found | Findings(notes=(note,), facts=self._losses(changing=False))

    def _call(self, call: Callable[[], None]) -> None:
        call()
        self.after_call()

    def _before_step(self, optimizer: torch.optim.Optimizer) -> None:
        looks = self._looks.get(id(optimizer), 0)
        if not self._roots and not looks:
            return  # no backward pass came before: a step of the optimizer alone
        self._looks[id(optimizer)] = looks + 1
        if looks >= _MOST_LOOKS:
            return
        with _disable_current_modes():
            trained = trained_by(optimizer)
            self._before |= digests(part for part in trained if id(part) not in self._before)
            self._gradients.look(trained)
        self._rates[id(optimizer)] = [float(group["lr"]) for group in optimizer.param_groups if "lr" in group]
        self._was_scheduled |= any(group.get("initial_lr") for group in optimizer.param_groups)

    def _facts(self) -> dict[str, Fact]:
        trained = self._gradients.tensors
        now = digests(trained)
        moved = sum(self._before[key] != value for key, value in now.items())
        facts = {"gradients": self._gradients.fact(names_of_living())}
        rates = {rate for each in self._rates.values() for rate in each}
        if moved or not (self._was_scheduled and rates == {0.0}):  # a schedule may have ended
            rate = f", learning rate {', '.join(f'{each:g}' for each in sorted(rates))}" if rates else ""
            seen = "moved" if moved else f"none of {len(trained)} tensors moved{rate}"
            facts["weights"] = Fact(asked="moved", seen=seen)
        return facts

    def _losses(self, *, changing: bool) -> dict[str, Fact]:
        """Return whether the losses are finite, and with `changing` not all equal. Narrow ones may be equal by rounding."""
        finite = [math.isfinite(loss) for loss in self.losses]
        if not all(finite):
            first = finite.index(False)
            return {"losses": Fact(asked="finite", seen=f"{self.losses[first]} in backward pass {first + 1}")}
        proven = changing and self._is_exact and len(self.losses) >= _LEAST_LOSSES
        if not proven or len(set(self.losses)) > 1:
            return {"losses": Fact(asked="finite", seen="finite")}
        return {"losses": Fact(asked="changing", seen=f"{self.losses[0]:g} {len(self.losses)} times")}


def _nothing(_: object) -> None:
    pass
