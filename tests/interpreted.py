"""Our Triton kernels for 4-bit products and for a prefill, run by Triton's interpreter on a CPU: `TRITON_INTERPRET=1 python -m tests.interpreted`. A line a product."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch.nn import functional

from hpc_core.builders.libraries import library
from hpc_core.case.errors import BuildError
from hpc_core.engines.decode.cache import StaticKeyValues
from hpc_core.engines.decode.model import decoder_of
from hpc_core.engines.decode.prefill import Places, PlainBetween
from hpc_core.engines.decode.prefill_kernels import KernelBetween
from hpc_core.engines.decode.products import product_of
from hpc_core.engines.kernels.layout import values_by_eights

BATCHES = (1, 2, 8, 9, 17, 32)
BATCHES_QUANTIZED_AGAIN = (1, 9)
"""One of each kernel: what differs is how a constant is made, not the batch."""
WIDTHS = (64, 320, 1088)
"""Columns: one block of constants, and two that are no multiple of what the warps of a program take at a time."""


def main() -> int:
    """Largest error of each product, relative to its largest value; 1 if one is not float32's."""
    worst = 0.0
    both = itertools.chain(
        itertools.product((False,), WIDTHS, BATCHES), itertools.product((True,), WIDTHS, BATCHES_QUANTIZED_AGAIN)
    )
    for nested, width, batch in both:
        for name, seen, wanted in _products(width, batch, nested=nested):
            error = float((seen - wanted).abs().max() / wanted.abs().max())
            print(f"{name} {width} {batch} {'quantized again' * nested} {error:.1e}")
            worst = max(worst, error)
    for name, seen, wanted in _between_products():
        error = float((seen - wanted).abs().max() / wanted.abs().max())
        print(f"prefill {name} {error:.1e}")
        worst = max(worst, error)
    print(_refused(96, 32), _refused(64, 24), sep="\n")
    return int(not worst < 1e-5)


def _products(width: int, batch: int, *, nested: bool) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    torch.manual_seed(width + batch)
    x = torch.randn(batch, width)
    around = torch.randn(batch, 32)
    rows = [_layer(width, each, has_bias=True, nested=nested) for each in (48, 16, 16)]
    pair = [_layer(width, 32, nested=nested), _layer(width, 32, nested=nested)]
    gate, up = (layer(x) for layer in pair)
    return [
        ("side by side, biases", _ours(rows, x, (True, False)), torch.cat([layer(x) for layer in rows], -1)),
        ("gated", _ours(pair, x, (True, True), gated=True), values_by_eights(functional.silu(gate) * up)),
        ("residual", _ours(pair[:1], x, (True, True), around=around), values_by_eights(gate + around)),
    ]


def _between_products() -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """What stands between the products of a prefill, ours and torch's, of two rows of which one is padded."""
    config = transformers.LlamaConfig(
        hidden_size=96, intermediate_size=64, num_hidden_layers=1, num_attention_heads=6, num_key_value_heads=3
    )
    decoder = decoder_of(transformers.LlamaForCausalLM(config).eval())
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
        turned, kept = query.clone(), cache.layers[0]
        with torch.no_grad():
            between.keep(turned, key.clone(), value, kept, places)
            every = {"norm": between.normed(norm, x), "some rows": between.normed(norm, x[3::7])}
            results.append(
                every
                | {"gate": between.gated(x.clone(), query), "query": turned, "keys": kept.keys, "values": kept.values}
            )
    ours, plain = results
    return [(name, ours[name], plain[name]) for name in ours]


def _layer(columns: int, rows: int, *, has_bias: bool = False, nested: bool = False) -> Any:
    nn = library("bitsandbytes", "The interpreted kernels").nn
    layer = nn.Linear4bit(
        columns, rows, bias=has_bias, compute_dtype=torch.float32, compress_statistics=nested, quant_type="nf4"
    )
    return layer.requires_grad_(False).to("cpu")


def _ours(
    layers: Sequence[Any],
    x: torch.Tensor,
    permuted: tuple[bool, bool],
    *,
    gated: bool = False,
    around: torch.Tensor | None = None,
) -> torch.Tensor:
    product = product_of(layers, batch=len(x), dummy=torch.zeros(1), early="none", gated=gated, permuted=permuted)
    out = torch.full((len(x), product.out_rows), float("nan"))
    product(values_by_eights(x), out, None if around is None else values_by_eights(around))
    return out


def _refused(columns: int, rows: int) -> str:
    try:
        product_of([_layer(columns, rows)], batch=4, dummy=torch.zeros(1), early="none")
    except BuildError as error:
        return f"refused: {error}"
    return f"{rows} rows of {columns} were taken"


if __name__ == "__main__":
    sys.exit(main())
