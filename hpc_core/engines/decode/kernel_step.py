"""One decode step by our own kernels: six launches a layer, every buffer allocated once. This module imports triton."""

from __future__ import annotations

import math
from typing import Any

import torch

from hpc_core.engines.decode.cache import StaticKeyValues
from hpc_core.engines.decode.model import Decoder, Layer
from hpc_core.engines.decode.prefill import Between
from hpc_core.engines.decode.prefill_kernels import KernelBetween
from hpc_core.engines.decode.products import (
    Early,
    Product,
    choose_blocks,
    launched,
    product_of,
)
from hpc_core.engines.kernels.attention import attend_part, join_parts
from hpc_core.engines.kernels.batch import embed, norm_rows
from hpc_core.engines.kernels.layout import Heads, packed_layout

_KEYS_A_BLOCK = 32
_PROGRAMS = 192
"""Attention is divided into about so many programs, more than a GPU has multiprocessors."""
_EMBED_BLOCK = 1024
_PRODUCTS = ("qkv", "output", "gate_up", "down")


class KernelStep:
    """Logits of the next token. Activations live in buffers that each layer overwrites."""

    kernels = "triton"

    def __init__(
        self,
        decoder: Decoder,
        cache: StaticKeyValues,
        turns: tuple[torch.Tensor, torch.Tensor],
        *,
        int8_head: bool,
        early: Early | None = None,
    ):
        self._decoder = decoder
        self._cache = cache
        self._turns = turns
        self.head = "int8" if int8_head else "plain"
        self._batch = cache.batch
        self._early = _early_launches(decoder.device, cache.batch) if early is None else early
        self._packed = decoder.four_bit
        """Whether activations are stored in the packed layout; see `kernels.vector`."""
        self._dummy = torch.zeros(1, dtype=decoder.dtype, device=decoder.device)
        self._layers = [self._prepared(layer) for layer in decoder.layers]
        gain = self._gain(decoder.final_norm)
        self._final_gain = gain
        self._head = self._product([decoder.head], gain, packed=(self._packed, False), int8=int8_head)
        self._make_buffers()

    def _gain(self, norm: Any) -> torch.Tensor:
        weight: torch.Tensor = norm.weight.detach()
        return packed_layout(weight) if self._packed else weight

    def _product(self, modules: Any, gain: torch.Tensor | None = None, **options: Any) -> Product:
        return product_of(
            modules,
            batch=self._batch,
            dummy=self._dummy,
            early=self._early,
            gain=gain,
            eps=self._decoder.eps,
            **options,
        )

    def _prepared(self, layer: Layer) -> dict[str, Any]:
        inside, both = (self._packed, False), (self._packed, self._packed)
        gains = self._gain(layer.input_norm), self._gain(layer.post_norm)
        return {
            "gains": gains,
            "qkv": self._product(layer.qkv, gains[0], packed=inside),
            "output": self._product([layer.output], packed=both),
            "gate_up": self._product(layer.gate_up, gains[1], gated=True, packed=both),
            "down": self._product([layer.down], packed=both),
        }

    def _make_buffers(self) -> None:
        decoder, batch = self._decoder, self._batch

        def empty(*shape: int, dtype: torch.dtype = decoder.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=decoder.device)

        most = max(1, self._cache.capacity // _KEYS_A_BLOCK)
        wanted = min(most, max(1, _PROGRAMS // (batch * decoder.groups)))
        self._parts = 1 << (wanted - 1).bit_length()
        heads = batch * decoder.heads
        self._hidden = empty(batch, decoder.hidden)
        self._middle = empty(batch, decoder.hidden)
        self._normed = empty(batch, decoder.hidden)
        self._qkv = empty(batch, (decoder.heads + 2 * decoder.groups) * decoder.head_width)
        self._mixed = empty(batch, decoder.heads * decoder.head_width)
        self._inner = empty(batch, decoder.inner)
        self._logits = empty(batch, decoder.vocabulary)
        self._highest = empty(heads, self._parts, dtype=torch.float32)
        self._weight = empty(heads, self._parts, dtype=torch.float32)
        self._part = empty(heads, self._parts, decoder.head_width, dtype=torch.float32)

    def owned_weights(self) -> list[torch.Tensor]:
        """Return the weights that it holds in addition to the model's own: an int8 head, and offsets of nested constants."""
        held = [
            tensor
            for tensor in (self._head.weight, self._head.scales)
            if self._head.kind == "int8" and tensor is not None
        ]
        constants = [layer[name].constants for layer in self._layers for name in _PRODUCTS]
        return held + [each.offsets for each in constants if each is not None and each.offsets is not None]

    def between(self) -> Between:
        """Return what a prefill computes between products: our own kernels."""
        return KernelBetween(self._decoder, self._turns)

    def logits_buffer(self) -> torch.Tensor:
        """Return the buffer (batch, vocabulary) of all tokens' logits, for the first token's too."""
        return self._logits

    def settle(self) -> dict[str, str]:
        """On a GPU, choose block sizes by trying them on the model's own weights; return what was chosen."""
        if self._decoder.device.type == "cpu":
            return {}
        chosen = {}
        buffers = {
            "qkv": (self._hidden, self._qkv),
            "output": (self._mixed, self._middle),
            "gate_up": (self._middle, self._inner),
            "down": (self._inner, self._hidden),
        }
        for name, (x, out) in buffers.items():
            products = [layer[name] for layer in self._layers]
            chosen[name] = choose_blocks(products, x, out)
        chosen["head"] = choose_blocks([self._head], self._hidden, self._logits)
        return chosen

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits (batch, vocabulary) after `tokens` (batch,), in a buffer that the next call overwrites."""
        decoder = self._decoder
        grid = (self._batch, -(-decoder.hidden // _EMBED_BLOCK))
        embed[grid](
            tokens,
            decoder.embedding,
            self._hidden,
            decoder.hidden,
            packed=self._packed,
            block=_EMBED_BLOCK,
            **launched(self._early),
        )
        for layer, kept in zip(self._layers, self._cache.layers, strict=True):
            layer["qkv"](self._norm(self._hidden, layer["gains"][0]), self._qkv)
            self._attend(kept)
            layer["output"](self._mixed, self._middle, residual=self._hidden)
            layer["gate_up"](self._norm(self._middle, layer["gains"][1]), self._inner)
            layer["down"](self._inner, self._hidden, residual=self._middle)
        self._head(self._norm(self._hidden, self._final_gain), self._logits)
        return self._logits

    def _norm(self, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        """Return the RMS norm of x; at batch 1 x itself, since there the norm is part of the next product."""
        if self._batch == 1:
            return x
        hidden = self._decoder.hidden
        block = 1 << (hidden - 1).bit_length()
        norm_rows[(self._batch,)](
            x, gain, self._normed, hidden, self._decoder.eps, block=block, num_warps=8, **launched(self._early)
        )
        return self._normed

    def _attend(self, kept: Any) -> None:
        decoder, cache = self._decoder, self._cache
        groups, shared, width = decoder.groups, decoder.heads // decoder.groups, decoder.head_width
        padded = max(16, 1 << (shared - 1).bit_length())
        form = Heads(groups, shared, padded, width, self._parts, _KEYS_A_BLOCK)
        attend_part[(self._batch * groups, self._parts)](
            self._qkv, *self._turns, kept.keys, kept.values, cache.first, cache.filled,
            self._highest, self._weight, self._part, 1.0 / math.sqrt(width), cache.capacity,
            heads_form=form, num_warps=4, **launched(self._early),
        )  # fmt: skip
        join_parts[(self._batch * decoder.heads,)](
            self._highest, self._weight, self._part, self._mixed, decoder.heads,
            packed=self._packed, width=width, parts=self._parts, num_warps=2, **launched(self._early),
        )  # fmt: skip


def _early_launches(device: torch.device, batch: int) -> Early:
    """Return which launches may begin early: none before Hopper, which introduced programmatic dependent launch.

    At batch 1 a product loads its first weights while the launch before it ends. With a batch it has few programs, and took up to twice as long
    (bench/studies/ablations/first-token-h200.json): they seem to begin wherever there is room while the launch before still runs, several on
    one multiprocessor and none on others.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return "none"
    return "all" if batch == 1 else "small"
