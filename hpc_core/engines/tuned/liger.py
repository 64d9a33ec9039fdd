"""Liger's kernels in one model: RMS norms, rotary positions, SwiGLU, and the linear cross-entropy.

Liger's own function for one model (`apply_liger_kernel_to_llama(model=…)`, 0.8) also patches transformers' module, and so
changes every later model of the process. Here each module of this model gets its own forward, which `forward.restore`
removes again.
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
    """Replaces an RMS norm's forward."""

    def __init__(self, module: Any, function: Any, called: dict[str, int]):
        self._module, self._function, self._called = module, function, called

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalize hidden states (..., features)."""
        _count(self._called, _NORM)
        normed: torch.Tensor = self._function.apply(
            hidden_states, self._module.weight, float(self._module.variance_epsilon), 0.0, "llama", True
        )
        return normed


class _Gated:
    """Replaces an MLP's forward."""

    def __init__(self, module: Any, function: Any, called: dict[str, int]):
        self._module, self._function, self._called = module, function, called

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Run the MLP on x (batch, length, features)."""
        _count(self._called, _SWIGLU)
        module = self._module
        output: torch.Tensor = module.down_proj(self._function.apply(module.gate_proj(x), module.up_proj(x)))
        return output


def refuse_without_gpu(device: torch.device, switch: str) -> None:
    """Check that Liger's kernels, which Triton compiles, can run on the device.

    Raises:
        BuildError: the device is not a CUDA GPU.
    """
    if device.type != "cuda":
        raise BuildError(
            f"{switch} runs Liger's kernels, which need a CUDA GPU, and this model is on {device}: run it there, or drop {switch}."
        )


def fuse_by_liger(causal: Any, called: dict[str, int]) -> None:
    """Replace the forwards of the model's norms, MLPs and attentions by ones with Liger's kernels, counted in `called`.

    Raises:
        BuildError: the model's layers are not built like Llama's, or it is not on a GPU.
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
    """A copy of the attention's forward in which the name of the rotation is bound to Liger's; the class is not changed."""
    original = inspect.unwrap(type(module).forward)
    if not isinstance(original, FunctionType) or _ROTATE not in original.__code__.co_names:
        raise BuildError(
            f"{type(module).__name__}.forward calls no {_ROTATE}: Liger cannot take its place, say fusion='off'."
        )

    def rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, **_: Any) -> Any:
        """Rotate q and k (batch, heads, length, width), views of (batch, length, heads, width), in place."""
        _count(called, _ROPE)
        return function.apply(q, k, cos, sin)

    names = {**original.__globals__, _ROTATE: rotate}
    copy = FunctionType(original.__code__, names, original.__name__, original.__defaults__, original.__closure__)
    copy.__kwdefaults__ = original.__kwdefaults__
    return MethodType(copy, module)


def seen_of_liger(decoder: Any, called: dict[str, int]) -> str | None:
    """Return "liger" if all modules of the decoder have Liger's kernels and each kind was called.

    If only some modules have them, return how many; if none has, return None.
    """
    layers = list(decoder.layers)
    norms = [
        decoder.norm,
        *(norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)),
    ]
    replaced = [isinstance(vars(norm).get("forward"), _Norm) for norm in norms]
    replaced += [isinstance(vars(layer.mlp).get("forward"), _Gated) for layer in layers]
    replaced += [_is_rotating(vars(layer.self_attn).get("forward")) for layer in layers]
    if not any(replaced):
        return None
    uncalled = [name for name in (_NORM, _ROPE, _SWIGLU) if not called.get(name)]
    if all(replaced) and not uncalled:
        return "liger"
    return f"{sum(replaced)} of {len(replaced)} modules by Liger" + (
        f", {', '.join(uncalled)} never called" if uncalled else ""
    )


def _is_rotating(forward: Any) -> bool:
    names = getattr(getattr(forward, "__func__", None), "__globals__", {})
    return getattr(names.get(_ROTATE), "__module__", "") == __name__


def chunk_rows(rows: int, vocabulary: int, features: int, constant: int) -> int:
    """Rows in a chunk of Liger's loss with this `chunk_mem_const` (`ops/fused_linear_cross_entropy.py`, 0.8)."""
    chunks = -(-vocabulary // (constant * features))
    rows_per_chunk = -(-rows // chunks)
    return min(rows, 1 << (rows_per_chunk - 1).bit_length())


def memory_constant(rows: int, vocabulary: int, features: int, least: int) -> int:
    """The smallest `chunk_mem_const` whose chunks have at least `least` rows, or all rows.

    Liger's default, 1, gives 64 rows for 2048 tokens and a vocabulary of 128 thousand, so it reads the head 32 times. With
    512 rows, which the constants 6 to 8 give, the products hide the time to read it.
    """
    required = min(least, rows)
    constant = 1
    while chunk_rows(rows, vocabulary, features, constant) < required:
        constant += 1
    return constant


def liger_cross_entropy(
    hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, *, least_rows: int, called: dict[str, int]
) -> torch.Tensor:
    """Mean cross-entropy over the labels that are not -100, a float32 scalar, by Liger's fused linear cross-entropy.

    hidden: (batch, length, features); head: (vocabulary, features); labels: (batch, length), as given to the model, not
    shifted. It waits for the device, because Liger counts labels with `.item()`, so it cannot be captured.

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
