"""Liger's kernels in one live model: RMS norms, rotary positions and SwiGLU, and its linear cross-entropy.

Liger's own patch of an instance (`apply_liger_kernel_to_llama(model=…)`, 0.8) also binds the names of transformers' module anew, and so changes every
model of the process from then on. Here each module of this model gets a forward of its own, and `forward.restore` takes them off again.
"""

from __future__ import annotations

import inspect
from types import FunctionType, MethodType
from typing import Any

import torch

from hpc_core.case.errors import BuildError, library
from hpc_core.engines.tuned.loss import IGNORED, next_tokens

_ROTATE = "apply_rotary_pos_emb"
_NORM, _ROPE, _SWIGLU = "liger_rms_norm", "liger_rope", "liger_swiglu"
_PARTS = {"norm": ("weight", "variance_epsilon"), "mlp": ("gate_proj", "up_proj", "down_proj", "act_fn")}


def _count(called: dict[str, int], name: str) -> None:
    called[name] = called.get(name, 0) + 1


class _Norm:
    """In place of an RMS norm's forward."""

    def __init__(self, module: Any, function: Any, called: dict[str, int]):
        self._module, self._function, self._called = module, function, called

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states: (..., features)."""
        _count(self._called, _NORM)
        normed: torch.Tensor = self._function.apply(
            hidden_states, self._module.weight, float(self._module.variance_epsilon), 0.0, "llama", True
        )
        return normed


class _Gated:
    """In place of an MLP's forward."""

    def __init__(self, module: Any, function: Any, called: dict[str, int]):
        self._module, self._function, self._called = module, function, called

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, length, features)."""
        _count(self._called, _SWIGLU)
        module = self._module
        inner: torch.Tensor = module.down_proj(self._function.apply(module.gate_proj(x), module.up_proj(x)))
        return inner


def refuse_without_gpu(device: torch.device, switch: str) -> None:
    """Liger's kernels are Triton's.

    Raises:
        BuildError: the device is no CUDA GPU.
    """
    if device.type != "cuda":
        raise BuildError(
            f"{switch} runs Liger's kernels, which need a CUDA GPU, and this model is on {device}: run it there, or drop {switch}."
        )


def fuse_by_liger(causal: Any, called: dict[str, int]) -> None:
    """Give norms, MLPs and attentions of this model forwards with Liger's kernels, counted in `called`; everything else stays.

    Raises:
        BuildError: the model's layers are not built as Llama's, or it is not on a GPU.
        MissingLibraryError: liger-kernel is not installed.
    """
    refuse_without_gpu(next(causal.parameters()).device, "fusion='liger'")
    ops = library("liger_kernel.ops", "fusion='liger'")
    decoder = causal.model
    for layer in decoder.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.forward = _Norm(_known(norm, "norm"), ops.LigerRMSNormFunction, called)
        if causal.config.get_text_config().hidden_act != "silu":
            raise BuildError("Liger's SwiGLU is for the activation silu: say fusion='off'.")
        layer.mlp.forward = _Gated(_known(layer.mlp, "mlp"), ops.LigerSiLUMulFunction, called)
        layer.self_attn.forward = _rotating(layer.self_attn, ops.LigerRopeFunction, called)
    decoder.norm.forward = _Norm(_known(decoder.norm, "norm"), ops.LigerRMSNormFunction, called)


def _known(module: Any, kind: str) -> Any:
    missing = [name for name in _PARTS[kind] if not hasattr(module, name)]
    if missing:
        raise BuildError(
            f"Liger's kernels are put into layers of Llama's kind; {type(module).__name__} has no {', '.join(missing)}: say fusion='off'."
        )
    return module


def _rotating(module: Any, function: Any, called: dict[str, int]) -> MethodType:
    """The attention's own forward with one of its names, the rotation, bound to Liger's: a function of its own, the module's stays."""
    own = inspect.unwrap(type(module).forward)
    if not isinstance(own, FunctionType) or _ROTATE not in own.__code__.co_names:
        raise BuildError(
            f"{type(module).__name__}.forward calls no {_ROTATE}: Liger cannot take its place, say fusion='off'."
        )

    def rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, **_: Any) -> Any:
        """q and k: (batch, heads, length, width), views of (batch, length, heads, width), which Liger changes in place."""
        _count(called, _ROPE)
        return function.apply(q, k, cos, sin)

    names = {**own.__globals__, _ROTATE: rotate}
    bound = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    bound.__kwdefaults__ = own.__kwdefaults__
    return MethodType(bound, module)


def seen_of_liger(decoder: Any, called: dict[str, int]) -> str | None:
    """The word "liger" where every module of the live decoder has Liger's kernels and each kind was called; a count where some have; None where none."""
    layers = list(decoder.layers)
    norms = [
        decoder.norm,
        *(norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)),
    ]
    have = [isinstance(vars(norm).get("forward"), _Norm) for norm in norms]
    have += [isinstance(vars(layer.mlp).get("forward"), _Gated) for layer in layers]
    have += [_is_rotating(vars(layer.self_attn).get("forward")) for layer in layers]
    if not any(have):
        return None
    uncalled = [name for name in (_NORM, _ROPE, _SWIGLU) if not called.get(name)]
    if all(have) and not uncalled:
        return "liger"
    return f"{sum(have)} of {len(have)} modules by Liger" + (
        f", {', '.join(uncalled)} never called" if uncalled else ""
    )


def _is_rotating(forward: Any) -> bool:
    named = getattr(getattr(forward, "__func__", None), "__globals__", {})
    return getattr(named.get(_ROTATE), "__module__", "") == __name__


def chunk_rows(rows: int, vocabulary: int, features: int, constant: int) -> int:
    """Rows that Liger's loss takes at a time under this `chunk_mem_const` (`ops/fused_linear_cross_entropy.py`, 0.8)."""
    shares = -(-vocabulary // (constant * features))
    wanted = -(-rows // shares)
    return min(rows, 1 << (wanted - 1).bit_length())


def memory_constant(rows: int, vocabulary: int, features: int, least: int) -> int:
    """The smallest `chunk_mem_const` whose chunks have at least `least` rows, or all rows.

    Liger's own, 1, gives 64 rows for 2048 tokens and a vocabulary of 128 thousand, and reads the head 32 times over; 512 rows, as the
    constants 6 to 8 give, hide that behind the products.
    """
    enough = min(least, rows)
    constant = 1
    while chunk_rows(rows, vocabulary, features, constant) < enough:
        constant += 1
    return constant


def liger_cross_entropy(
    hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, *, least_rows: int, called: dict[str, int]
) -> torch.Tensor:
    """Mean cross-entropy over the labels that are not -100, a float32 scalar, by Liger's fused linear cross-entropy.

    hidden: (batch, length, features); head: (vocabulary, features); labels: (batch, length), as given to the model, not moved. It waits
    for the device (Liger counts the labels with `.item()`), so it cannot be captured.

    Raises:
        MissingLibraryError: liger-kernel is not installed.
    """
    functional = library("liger_kernel.transformers.functional", "loss='liger'")
    rows = hidden.reshape(-1, hidden.shape[-1])
    constant = memory_constant(len(rows), int(head.shape[0]), int(head.shape[1]), least_rows)
    _count(called, "liger_loss")
    loss: torch.Tensor = functional.liger_fused_linear_cross_entropy(
        rows, head, next_tokens(labels).reshape(-1), ignore_index=IGNORED, chunk_mem_const=constant
    )
    return loss
