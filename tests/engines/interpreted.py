"""Check our Triton kernels on a CPU: `TRITON_INTERPRET=1 python -m tests.engines.interpreted` prints each one's error."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch.nn import functional

from hpc_core.case.errors import BuildError, library
from hpc_core.engines.decode.cache import StaticKeyValues
from hpc_core.engines.decode.kernel_step import KernelStep
from hpc_core.engines.decode.model import Decoder, decoder_of
from hpc_core.engines.decode.plain_step import PlainStep
from hpc_core.engines.decode.prefill import Places, PlainBetween
from hpc_core.engines.decode.prefill_kernels import KernelBetween
from hpc_core.engines.decode.products import product_of
from hpc_core.engines.kernels.layout import packed_layout

SHAPES = (
    (64, 1, False),
    (64, 2, False),
    (64, 32, False),
    (320, 1, False),
    (320, 9, False),
    (320, 17, False),
    (64, 9, True),
    (320, 1, True),
)
"""Columns, batch, and whether constants are quantized again.

64 columns are one block of constants; 320 are more than a program takes at once, and no multiple of it. Batches are
padded to 8, 16 and 32; a batch of 32 has no padding.
"""


def main() -> int:
    """Print each result's largest error relative to its largest value; return 1 if one is above float32's rounding."""
    results: list[tuple[str, torch.Tensor, torch.Tensor]] = []
    for width, batch, nested in SHAPES:
        for name, computed, expected in _products(width, batch, nested=nested):
            results.append((f"{name} {width} {batch}{' quantized again' * nested}", computed, expected))
    for name, computed, expected in _between_products():
        results.append((f"prefill {name}", computed, expected))
    results += [(f"step of batch {batch}", *_step(batch)) for batch in (1, 3)]
    worst = 0.0
    for name, computed, expected in results:
        error = float((computed - expected).abs().max() / expected.abs().max())
        print(f"{name} {error:.1e}")
        worst = max(worst, error)
    print(_refusal(96, 32), _refusal(64, 24), sep="\n")
    return int(not worst < 1e-5)


def _products(width: int, batch: int, *, nested: bool) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    torch.manual_seed(width + batch)
    x = torch.randn(batch, width)
    residual = torch.randn(batch, 32)
    rows = [_layer(width, each, has_bias=True, nested=nested) for each in (48, 16, 16)]
    pair = [_layer(width, 32, nested=nested), _layer(width, 32, nested=nested)]
    gate, up = (layer(x) for layer in pair)
    return [
        ("side by side, biases", _product(rows, x, (True, False)), torch.cat([layer(x) for layer in rows], -1)),
        ("gated", _product(pair, x, (True, True), gated=True), packed_layout(functional.silu(gate) * up)),
        ("residual", _product(pair[:1], x, (True, True), residual=residual), packed_layout(gate + residual)),
    ]


def _decoder() -> Decoder:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=96,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=6,
        num_key_value_heads=3,
        vocab_size=64,
    )
    return decoder_of(transformers.LlamaForCausalLM(config).eval())


def _step(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of two tokens after a padded prompt, by our kernels and by torch's operators, with plain weights."""
    decoder = _decoder()
    turns = decoder.turns(64)
    logits = []
    for name in ("triton", "torch"):
        cache = StaticKeyValues(decoder, batch, 64)
        cache.begin(40, torch.arange(batch) * 2)
        cache.whole.copy_(torch.randn(cache.whole.shape, generator=torch.Generator().manual_seed(1)))
        step: Any = (
            KernelStep(decoder, cache, turns, int8_head=False, early="none")
            if name == "triton"
            else PlainStep(decoder, cache, turns, decoder.head, eager=True)
        )
        tokens = torch.arange(batch)
        with torch.no_grad():
            of_steps = []
            for _ in range(2):
                of_steps.append(step(tokens).clone())
                cache.filled += 1
                cache.length += 1
            logits.append(torch.stack(of_steps))
    return logits[0], logits[1]


def _between_products() -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """What runs between the products of a prefill, by our kernels and by torch's operators; one of two rows is padded."""
    decoder = _decoder()
    turns = decoder.turns(24)
    width, first = 20, torch.tensor([5, 0], dtype=torch.int32)
    positions = (torch.arange(width)[None] - first[:, None]).clamp(min=0)
    places = Places(width, first, turns[0][positions], turns[1][positions], None)
    query, key, value, x = (torch.randn(2 * width, size) for size in (96, 48, 48, 96))
    norm = decoder.layers[0].input_norm
    norm.weight.data.normal_()
    results = []
    for between in (KernelBetween(decoder, turns), PlainBetween()):
        cache = StaticKeyValues(decoder, 2, 24)
        rotated, layer_cache = query.clone(), cache.layers[0]
        with torch.no_grad():
            between.keep(rotated, key.clone(), value, layer_cache, places)
            outputs = {"norm": between.normed(norm, x), "some rows": between.normed(norm, x[3::7])}
            outputs |= {"gate": between.gated(x.clone(), query), "query": rotated}
            results.append(outputs | {"keys": layer_cache.keys, "values": layer_cache.values})
    kernels, plain = results
    return [(name, kernels[name], plain[name]) for name in kernels]


def _layer(columns: int, rows: int, *, has_bias: bool = False, nested: bool = False) -> Any:
    nn = library("bitsandbytes", "The interpreted kernels").nn
    layer = nn.Linear4bit(
        columns, rows, bias=has_bias, compute_dtype=torch.float32, compress_statistics=nested, quant_type="nf4"
    )
    return layer.requires_grad_(False).to("cpu")


def _product(
    layers: Sequence[Any],
    x: torch.Tensor,
    packed: tuple[bool, bool],
    *,
    gated: bool = False,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    product = product_of(layers, batch=len(x), dummy=torch.zeros(1), early="none", gated=gated, packed=packed)
    out = torch.full((len(x), product.out_rows), float("nan"))
    product(packed_layout(x), out, None if residual is None else packed_layout(residual))
    return out


def _refusal(columns: int, rows: int) -> str:
    try:
        product_of([_layer(columns, rows)], batch=4, dummy=torch.zeros(1), early="none")
    except BuildError as error:
        return f"refused: {error}"
    return f"accepted: {rows} rows of {columns} columns"


if __name__ == "__main__":
    sys.exit(main())
