"""What lies between the matrix products of a decoder layer and of the loss, norms, gates, rotations, softmax; and AdamW. Functions of tensors alone.

On a GPU each is one kernel, or two, made by torch.compile: called inside autograd functions, where no gradient is recorded, so that nothing
is guarded but shapes. Elsewhere they run as plain torch. Arithmetic is float32 inside, as in the libraries; in float64 it stays float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from hpc_core.engines.tuned.compile import room_for_shapes

Body = Callable[..., Any]


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """RMS norm over the last dimension, and 1 / root mean square as (..., 1). Rounds as transformers' LlamaRMSNorm does."""
    wide = _wide(x)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype), scale


def add_and_norm(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sum of both, its norm, and the norm's scale."""
    total = x + delta
    return (total, *norm(total, weight, eps))


def norm_again(x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The norm by the scale that its forward found."""
    return weight * (_wide(x) * scale).to(x.dtype)


def norm_backward(
    gradient: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None
) -> torch.Tensor:
    """Gradient of the norm's input, with `residual`, the gradient that comes to it by the residual path, added."""
    unit = _wide(x) * scale
    inner = _wide(gradient) * _wide(weight)
    found = scale * (inner - unit * (inner * unit).mean(-1, keepdim=True))
    return (found if residual is None else found + _wide(residual)).to(x.dtype)


def norm_weight_gradient(gradient: torch.Tensor, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Gradient of the norm's weight, (features,), from rows flattened to (rows, features)."""
    return (_wide(gradient) * (_wide(x) * scale)).sum(0).to(x.dtype)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up."""
    return torch.nn.functional.silu(gate) * up


def swiglu_backward(gradient: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Gradient of up; the gate's is put in the place of `gradient`, which nobody needs any more. It is the backward's highest point."""
    wide, arrived = _wide(gate), _wide(gradient)
    share = torch.sigmoid(wide)
    slope = share * (1 + wide * (1 - share))
    d_up = (arrived * wide * share).to(up.dtype)
    gradient.copy_(arrived * _wide(up) * slope)
    return d_up


def rotate(
    queries: torch.Tensor, keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary positions, halves as in transformers. Queries and keys (batch, length, heads, width), cos and sin (length, 1, width).

    The backward is the same with -sin: a rotation's transpose turns back.
    """
    return _turn(queries, cos, sin), _turn(keys, cos, sin)


def rotate_and_split(
    joined: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, queries: int, keys: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of their own, rotated but for the values, from (rows, all heads times width), side by side.

    Each (batch, length, heads, width); the first `queries` heads and the `keys` behind them are so named, the rest are values.
    """
    length, _, width = cos.shape
    heads = joined.view(-1, length, joined.shape[1] // width, width)
    q, k, v = heads.split((queries, keys, heads.shape[2] - queries - keys), dim=2)
    return _turn(q, cos, sin), _turn(k, cos, sin), v.clone(memory_format=torch.contiguous_format)


def rotate_and_join(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Queries and keys rotated, values as they are, side by side as (rows, all heads times width). With -sin the way back of `rotate_and_split`."""
    joined = torch.cat((_turn(queries, cos, sin), _turn(keys, cos, sin), values), dim=2)
    return joined.view(-1, joined.shape[2] * joined.shape[3])


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def row_losses(logits: torch.Tensor, targets: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the cross-entropies of the kept rows, and each row's logsumexp as (rows, 1); logits (rows, vocabulary)."""
    wide = _wide(logits)
    whole = torch.logsumexp(wide, dim=-1, keepdim=True)
    chosen = wide.gather(1, targets.unsqueeze(1))
    return ((whole - chosen).squeeze(1) * kept).sum(), whole


def logits_into_gradient(
    logits: torch.Tensor, whole: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor
) -> None:
    """Put (softmax - one-hot) times each row's weight (rows,) in the logits' place: a chunk of them is 131 MB, and needed once."""
    likely = torch.exp(_wide(logits) - whole)
    columns = torch.arange(logits.shape[1], device=logits.device)
    hot = (columns == targets.unsqueeze(1)).to(likely.dtype)
    logits.copy_((likely - hot) * weight.unsqueeze(1))


def adamw(
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    average: torch.Tensor,
    square: torch.Tensor,
    steps: torch.Tensor,
    rate: float,
    decay: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """One step of AdamW in place, as torch's fused kernel takes it; all (elements,), but `steps`, a scalar: those taken before.

    Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019), algorithm 2. Moments are used before they are rounded to their dtype.
    """
    wide, arrived, count = _wide(parameter), _wide(gradient), steps + 1
    moved = beta1 * _wide(average) + (1 - beta1) * arrived
    spread = beta2 * _wide(square) + (1 - beta2) * arrived * arrived
    unbiased = torch.sqrt(spread) / torch.sqrt(1 - beta2**count) + eps
    parameter.copy_(wide * (1 - rate * decay) - rate / (1 - beta1**count) * moved / unbiased)
    average.copy_(moved)
    square.copy_(spread)


_BODIES: dict[str, Body] = {
    "norm": norm,
    "add_and_norm": add_and_norm,
    "norm_again": norm_again,
    "norm_backward": norm_backward,
    "norm_weight_gradient": norm_weight_gradient,
    "swiglu": swiglu,
    "swiglu_backward": swiglu_backward,
    "rotate": rotate,
    "rotate_and_join": rotate_and_join,
    "rotate_and_split": rotate_and_split,
    "row_losses": row_losses,
    "logits_into_gradient": logits_into_gradient,
    "adamw": adamw,
}


class Pointwise:
    """The functions above by name, compiled or plain. `called` counts those that ran, so that an audit can tell which did."""

    def __init__(self, *, compiled: bool):
        self.compiled = compiled
        if compiled:
            room_for_shapes()
        self.called: dict[str, int] = dict.fromkeys(_BODIES, 0)
        self._run: dict[str, Body] = {
            name: torch.compile(body, fullgraph=True, dynamic=False) if compiled else body
            for name, body in _BODIES.items()
        }

    def __call__(self, name: str, *arguments: Any) -> Any:
        """Run one. Tensors are detached: a kernel needs no graph, and whether a tensor wants one would be guarded.

        While a dispatch mode counts operators it runs as plain torch: torch.compile refuses to run there.
        """
        self.called[name] += 1
        run = _BODIES[name] if is_in_torch_dispatch_mode() else self._run[name]
        with torch.no_grad():
            return run(*(each.detach() if isinstance(each, torch.Tensor) else each for each in arguments))


def sum_and_norm(
    run: Pointwise, x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x + delta, or x itself where there is no delta; its RMS norm; the norm's scale."""
    if delta is None:
        return (x, *run("norm", x, weight, eps))
    total, inner, scale = run("add_and_norm", x, delta, weight, eps)
    return total, inner, scale
