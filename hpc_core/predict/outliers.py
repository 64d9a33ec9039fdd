"""How many columns of a layer's input LLM.int8 multiplies apart: with drawn weights the distribution says it, values are not needed.

bitsandbytes takes every column that holds an activation of 6 or more out of the int8 product (Dettmers et al., LLM.int8(), 2022). With
weights drawn from a normal distribution a norm's output is standard normal, and reaches 6 in one of 5e8 numbers: no column. What `down_proj` is given
is silu(gate) times up, each normal with the deviation STD * sqrt(hidden size), and its products reach 6 often.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np
import torch

from hpc_core.builders.drawn import STD

__all__ = ["Outliers", "expected_columns", "share_beyond"]

_QUANTILES = 2000
"""A side: four million pairs of a gate and an up value, each as likely as the others."""


def share_beyond(threshold: float, deviation: float) -> float:
    """The share of silu(gate) * up whose magnitude is at least `threshold`, gate and up normal with this standard deviation."""
    normal = NormalDist(0, deviation)
    values = np.array([normal.inv_cdf((number + 0.5) / _QUANTILES) for number in range(_QUANTILES)])
    gate = values / (1 + np.exp(-values))
    return float(np.mean(np.abs(np.outer(gate, values)) >= threshold))


def expected_columns(rows: int, columns: int, share: float) -> int:
    """How many columns of (rows, columns) hold at least one of the numbers of which each is one with this chance."""
    return round(columns * -math.expm1(rows * math.log1p(-share)))


class Outliers:
    """Knows which layer runs, and what its input holds; asked by the stand-ins of bitsandbytes' int8 operators."""

    def __init__(self) -> None:
        self._deviation: float | None = None
        self._shares: dict[tuple[float, float], float] = {}

    def watch(self, model: torch.nn.Module, hidden_size: int) -> None:
        """From now on know when a `down_proj` of this model runs, whose weights are drawn."""
        for name, module in model.named_modules():
            if name.rpartition(".")[2] == "down_proj":
                module.register_forward_pre_hook(self._entered(STD * math.sqrt(hidden_size)))
                module.register_forward_hook(self._left)

    def columns(self, rows: int, columns: int, threshold: float) -> int:
        """So many columns of the running layer's (rows, columns) input are multiplied apart."""
        if self._deviation is None:
            return 0
        key = (threshold, self._deviation)
        if key not in self._shares:
            self._shares[key] = share_beyond(*key)
        return expected_columns(rows, columns, self._shares[key])

    def _entered(self, deviation: float) -> Any:
        def enter(*_: Any) -> None:
            self._deviation = deviation

        return enter

    def _left(self, *_: Any) -> None:
        self._deviation = None
