"""Linear layers with a common input, each with its adapter: forward and backward written out, so that nothing is computed twice.

A layer's weight is plain or in 4 bits; the latter is dequantized once in the forward and once in the backward, and never kept. An
adapter's update is added inside the product that computes it. Saved are the input (or what it can be computed from) and the low-rank product.
Shapes: input (rows, in), outputs (rows, out), A (rank, in), B (out, rank).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hpc_core.case.errors import BuildError, library

PER = 4
"""Tensors of a projection: weight, bias, A, B."""
Given = Sequence[torch.Tensor | None]


@dataclass(frozen=True)
class Projection:
    """What a linear layer multiplies by. If it is quantized, `weight` is None for autograd and `packed` holds it."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    lora_a: torch.Tensor | None = None
    lora_b: torch.Tensor | None = None
    scale: float = 1.0
    packed: Any = None
    dequantize: Any = None
    """bitsandbytes' function for `packed`; looked up beforehand, since torch.compile traces no import."""

    def dense(self, weight: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight (out, in) in `dtype`; a 4-bit one is dequantized into a new tensor."""
        if weight is not None:
            return weight
        whole: torch.Tensor = self.dequantize(self.packed.data, self.packed.quant_state)
        return whole if whole.dtype == dtype else whole.to(dtype)


def projection_of(module: Any) -> Projection:
    """Return the projection that this module computes: a linear layer of torch or bitsandbytes (4-bit), or peft's LoRA on one.

    Raises:
        BuildError: it is of another kind, or its adapter does more than a plain LoRA: dropout, several at once, DoRA.
    """
    base = getattr(module, "base_layer", module)
    kinds = {parent.__name__ for parent in type(base).__mro__}
    if "Linear8bitLt" in kinds or not ("Linear4bit" in kinds or isinstance(base, torch.nn.Linear)):
        raise BuildError(
            f"The tuned engine fuses linear layers of torch and 4-bit ones of bitsandbytes, not {type(base).__name__}: say fusion='off'."
        )
    packed = base.weight if "Linear4bit" in kinds else None
    weight = None if packed is not None else base.weight
    dequantize = None
    if packed is not None:
        dequantize = library("bitsandbytes", "Dequantizing weights").functional.dequantize_4bit
    if base is module:
        return Projection(weight, base.bias, packed=packed, dequantize=dequantize)
    names = list(module.active_adapters)
    plain = len(names) == 1 and names[0] in module.lora_A and not module.merged and not module.disable_adapters
    name = names[0] if plain else ""
    plain = plain and isinstance(module.lora_dropout[name], torch.nn.Identity)
    plain = plain and not getattr(module, "use_dora", {}).get(name, False)
    if not plain:
        raise BuildError(
            "The tuned engine fuses one plain, unmerged LoRA adapter without dropout and DoRA a layer; this model has another: say fusion='off'."
        )
    down, up = module.lora_A[name].weight, module.lora_B[name].weight
    return Projection(weight, base.bias, down, up, float(module.scaling[name]), packed, dequantize)


@dataclass(frozen=True)
class Joined:
    """The weights of several projections below each other, so that one product serves all: `whole` (sum of outs, in), or None for 4-bit ones."""

    projections: tuple[Projection, ...]
    rows: tuple[int, ...]
    columns: int
    whole: torch.Tensor | None

    def dense(self, like: torch.Tensor) -> torch.Tensor:
        """(sum of outs, in); 4-bit weights are dequantized into one new tensor in the dtype and on the device of `like`."""
        if self.whole is not None:
            return self.whole
        found = like.new_empty((sum(self.rows), self.columns))
        for one, part in zip(self.projections, found.split(self.rows), strict=True):
            if like.is_cuda:
                one.dequantize(one.packed.data, one.packed.quant_state, out=part)
            else:  # bitsandbytes writes into what is there on a GPU only
                part.copy_(one.dequantize(one.packed.data, one.packed.quant_state))
        return found


def joined(projections: Sequence[Projection], dtype: torch.dtype) -> Joined | None:
    """Join projections into one if their weights are frozen and none has a bias; else return None.

    Plain weights move into one storage, and each module's weight becomes a view of it: no byte is stored twice, and every module computes as
    before. 4-bit weights stay where they are; they must dequantize to `dtype`.
    """
    if any(one.bias is not None for one in projections):
        return None
    if all(one.packed is not None and one.packed.quant_state.dtype == dtype for one in projections):
        shapes = [tuple(one.packed.quant_state.shape) for one in projections]
        rows = tuple(int(shape[0]) for shape in shapes)
        return Joined(tuple(projections), rows, int(shapes[0][1]), None)
    weights = [one.weight for one in projections if one.weight is not None]
    if len(weights) != len(projections) or any(weight.requires_grad or weight.dtype != dtype for weight in weights):
        return None
    rows = tuple(int(weight.shape[0]) for weight in weights)
    whole = torch.cat([weight.detach() for weight in weights])
    for weight, part in zip(weights, whole.split(rows), strict=True):
        weight.data = part
    return Joined(tuple(projections), rows, int(whole.shape[1]), whole)


def tensors_of(projections: Sequence[Projection]) -> list[torch.Tensor | None]:
    """Return the tensors that autograd must know of, four for each projection."""
    return [each for one in projections for each in (one.weight, one.bias, one.lora_a, one.lora_b)]


def _parts(tensors: Given, index: int) -> tuple[torch.Tensor | None, ...]:
    return tuple(tensors[PER * index : PER * index + PER])


def _downs(
    projections: Sequence[Projection], tensors: Given, dtype: torch.dtype
) -> tuple[torch.Tensor | None, list[int]]:
    """Return all A stacked, so that the input is read once, and the rank of each; 0 without an adapter."""
    found = [tensors[PER * index + 2] for index in range(len(projections))]
    ranks = [0 if each is None else int(each.shape[0]) for each in found]
    kept = [each.detach().to(dtype) for each in found if each is not None]
    if not kept:
        return None, ranks
    return kept[0] if len(kept) == 1 else torch.cat(kept), ranks


def low_of(projections: Sequence[Projection], tensors: Given, x: torch.Tensor) -> torch.Tensor | None:
    """Return x times all A, (rows, sum of ranks); None without an adapter."""
    downs, _ = _downs(projections, tensors, x.dtype)
    return None if downs is None else x @ downs.t()


def forward_of(
    projections: Sequence[Projection], tensors: Given, x: torch.Tensor, made: Sequence[torch.Tensor] | None = None
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Return each projection of `x`, and x times all A, (rows, sum of ranks); None without an adapter.

    `made`: the products with the weights, without bias, where they are there already; the adapters' are added in place.
    """
    downs, ranks = _downs(projections, tensors, x.dtype)
    low = None if downs is None else x @ downs.t()
    outputs, column = [], 0
    for index, one in enumerate(projections):
        weight, bias, _, up = _parts(tensors, index)
        y = torch.nn.functional.linear(x, one.dense(weight, x.dtype), bias) if made is None else made[index]
        if up is not None and low is not None:
            y.addmm_(low[:, column : column + ranks[index]], up.to(x.dtype).t(), alpha=one.scale)
        column += ranks[index]
        outputs.append(y)
    return outputs, low


def backward_of(
    projections: Sequence[Projection],
    tensors: Given,
    arrived: Sequence[torch.Tensor],
    x: torch.Tensor | None,
    low: torch.Tensor | None,
    needs: Sequence[bool],
    *,
    need_input: bool,
    begun: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """Return the gradient of the input, None unless needed, and of each tensor in the order of `tensors_of`, None where `needs` says so.

    `x` may be None where no weight and no A wants a gradient. `begun`: the input's gradient by all weights, where
    it is there already; the adapters' is added in place.
    """
    dtype = arrived[0].dtype
    d_x = begun
    found: list[torch.Tensor | None] = [None] * len(tensors)
    rising: list[torch.Tensor] = []
    downs, ranks = _downs(projections, tensors, dtype)
    column = 0
    for index, (one, gradient) in enumerate(zip(projections, arrived, strict=True)):
        weight, bias, _, up = _parts(tensors, index)
        at = PER * index
        if need_input and begun is None:
            dense = one.dense(weight, dtype)
            d_x = gradient @ dense if d_x is None else d_x.addmm_(gradient, dense)
            del dense
        if needs[at] and x is not None and weight is not None:
            found[at] = gradient.t() @ x
        if needs[at + 1] and bias is not None:
            found[at + 1] = gradient.sum(0).to(bias.dtype)
        if up is not None and low is not None:
            rising.append(_scaled(gradient, up.to(dtype), one.scale))
            found[at + 3] = _scaled(gradient.t(), low[:, column : column + ranks[index]], one.scale).to(up.dtype)
        column += ranks[index]
    if downs is not None:
        all_up = rising[0] if len(rising) == 1 else torch.cat(rising, dim=1)
        if d_x is not None:
            d_x.addmm_(all_up, downs)
        if x is not None:
            _spread_downs(all_up.t() @ x, ranks, tensors, found)
    return d_x, found


def _scaled(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """left @ right * scale, the scale inside the product; with beta=0 what is added to is not even read."""
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scale)


def _spread_downs(whole: torch.Tensor, ranks: list[int], tensors: Given, found: list[torch.Tensor | None]) -> None:
    row = 0
    for index, rank in enumerate(ranks):
        down = tensors[PER * index + 2]
        if down is not None:
            found[PER * index + 2] = whole[row : row + rank].to(down.dtype)
        row += rank
