"""The operations between matrix products of a decoder layer and of the loss (norms, gates, rotations, softmax), and AdamW.

Each is a function of tensors alone. On a GPU torch.compile makes one or two kernels of it. It is called inside autograd
functions, where no gradient is recorded, so only shapes are guarded. Elsewhere it runs as plain torch. Arithmetic is in
float32, as in the libraries, or in float64 for float64 inputs.
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
    """The RMS norm over the last dimension, rounded like LlamaRMSNorm, and 1 / root mean square as (..., 1)."""
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
    """The norm, from the scale that its forward computed."""
    return weight * (_wide(x) * scale).to(x.dtype)


def norm_backward(
    gradient: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None
) -> torch.Tensor:
    """Gradient of the norm's input, plus `residual`, the gradient from the residual path."""
    unit = _wide(x) * scale
    inner = _wide(gradient) * _wide(weight)
    d_input = scale * (inner - unit * (inner * unit).mean(-1, keepdim=True))
    return (d_input if residual is None else d_input + _wide(residual)).to(x.dtype)


def norm_weight_gradient(gradient: torch.Tensor, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Gradient of the norm's weight, (features,), from rows flattened to (rows, features)."""
    return (_wide(gradient) * (_wide(x) * scale)).sum(0).to(x.dtype)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up."""
    return torch.nn.functional.silu(gate) * up


def swiglu_backward(gradient: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return the gradient of `up` and overwrite `gradient`, which is not needed again, with that of `gate`.

    Memory is at the backward's peak here.
    """
    wide_gate, wide_gradient = _wide(gate), _wide(gradient)
    sigmoid = torch.sigmoid(wide_gate)
    slope = sigmoid * (1 + wide_gate * (1 - sigmoid))
    d_up = (wide_gradient * wide_gate * sigmoid).to(up.dtype)
    gradient.copy_(wide_gradient * _wide(up) * slope)
    return d_up


def rotate(
    queries: torch.Tensor, keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply rotary positions by halves, as in transformers.

    Queries and keys are (batch, length, heads, width), cos and sin (length, 1, width). The backward is the same with -sin,
    because a rotation's transpose is its inverse.
    """
    return _turn(queries, cos, sin), _turn(keys, cos, sin)


def rotate_and_split(
    joined: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, queries: int, keys: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split (rows, all heads times width) into queries, keys and values, and rotate queries and keys.

    Each result is a copy of (batch, length, heads, width). The first `queries` heads are queries, the next `keys` heads
    are keys, and the rest are values.
    """
    length, _, width = cos.shape
    heads = joined.view(-1, length, joined.shape[1] // width, width)
    q, k, v = heads.split((queries, keys, heads.shape[2] - queries - keys), dim=2)
    return _turn(q, cos, sin), _turn(k, cos, sin), v.clone(memory_format=torch.contiguous_format)


def rotate_and_join(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Rotate queries and keys, and join them with the values into (rows, all heads times width).

    With -sin it is the inverse of `rotate_and_split`.
    """
    joined = torch.cat((_turn(queries, cos, sin), _turn(keys, cos, sin), values), dim=2)
    return joined.view(-1, joined.shape[2] * joined.shape[3])


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def row_losses(logits: torch.Tensor, targets: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of cross-entropies over the `kept` rows of logits (rows, vocabulary), and each row's logsumexp (rows, 1)."""
    wide = _wide(logits)
    whole = torch.logsumexp(wide, dim=-1, keepdim=True)
    chosen = wide.gather(1, targets.unsqueeze(1))
    return ((whole - chosen).squeeze(1) * kept).sum(), whole


def logits_into_gradient(
    logits: torch.Tensor, whole: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor
) -> None:
    """Overwrite the logits with (softmax - one-hot) times each row's weight (rows,).

    A chunk of logits has 131 MB and is not needed again.
    """
    probabilities = torch.exp(_wide(logits) - whole)
    columns = torch.arange(logits.shape[1], device=logits.device)
    one_hot = (columns == targets.unsqueeze(1)).to(probabilities.dtype)
    logits.copy_((probabilities - one_hot) * weight.unsqueeze(1))


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
    """Take one step of AdamW in place, like torch's fused kernel. All tensors are (elements,) but `steps`, the steps before.

    Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019), algorithm 2. Moments are used before they are
    rounded to their dtype.
    """
    wide_parameter, wide_gradient, count = _wide(parameter), _wide(gradient), steps + 1
    first_moment = beta1 * _wide(average) + (1 - beta1) * wide_gradient
    second_moment = beta2 * _wide(square) + (1 - beta2) * wide_gradient * wide_gradient
    denominator = torch.sqrt(second_moment) / torch.sqrt(1 - beta2**count) + eps
    parameter.copy_(wide_parameter * (1 - rate * decay) - rate / (1 - beta1**count) * first_moment / denominator)
    average.copy_(first_moment)
    square.copy_(second_moment)


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
    """The functions above by name, compiled or plain. `called` counts the calls of each, for the audit."""

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
        """Run one function. Tensors are detached, because otherwise torch.compile guards on `requires_grad`.

        Under a dispatch mode, which counts operators and in which torch.compile does not run, it runs as plain torch.
        """
        self.called[name] += 1
        run = _BODIES[name] if is_in_torch_dispatch_mode() else self._run[name]
        with torch.no_grad():
            return run(*(each.detach() if isinstance(each, torch.Tensor) else each for each in arguments))


def sum_and_norm(
    run: Pointwise, x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sum x + delta, or x without a delta; its RMS norm; and the norm's scale."""
    if delta is None:
        return (x, *run("norm", x, weight, eps))
    total, inner, scale = run("add_and_norm", x, delta, weight, eps)
    return total, inner, scale
