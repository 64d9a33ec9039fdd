"""Whether a training taught its model anything: did weights move, are the losses numbers. Reads a few numbers of each tensor, twice."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from hpc_core.record.record import Fact

_NUMBERS = 16
"""Of each trainable tensor, from its beginning."""


class Learning:
    """Remembers the first numbers of every trainable tensor, to see later which have moved."""

    def __init__(self, model: torch.nn.Module) -> None:
        with torch.no_grad():
            self._before = {
                name: parameter.detach().flatten()[:_NUMBERS].clone()
                for name, parameter in model.named_parameters()
                if parameter.requires_grad and parameter.numel() and parameter.layout == torch.strided
            }

    def facts(self, model: torch.nn.Module, losses: Sequence[float], steps: int, notes: list[str]) -> dict[str, Fact]:
        """`weights_moved`, once two steps were done (the first of a warm-up has a rate of 0), and `losses_finite` where any was logged."""
        facts: dict[str, Fact] = {}
        now = dict(model.named_parameters())
        known = [name for name in self._before if name in now]  # a wrapper may rename them
        moved = [name for name in known if _differs(self._before[name], now[name])]
        if known and steps > 1:
            facts["weights_moved"] = Fact(asked=True, seen=bool(moved))
            notes.append(f"{len(moved)} of {len(known)} trainable tensors moved in their first {_NUMBERS} numbers")
        if losses:
            facts["losses_finite"] = Fact(asked=True, seen=all(map(math.isfinite, losses)))
        return facts


def _differs(before: torch.Tensor, parameter: torch.nn.Parameter) -> bool:
    after = parameter.detach().flatten()[:_NUMBERS].to(before.device)
    return after.shape == before.shape and not torch.equal(after, before)
