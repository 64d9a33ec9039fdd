"""The graph engine's prefill on a CPU: hidden states, cache, memory, and pieces of 4-bit matrices."""

from __future__ import annotations

import gc
from typing import Any, cast

import pytest
import torch
import transformers

from hpc_core.builders.assemble import build
from hpc_core.case.errors import library
from hpc_core.case.parts import ModelSpec, QuantSpec
from hpc_core.case.workloads import GenerateSpec
from hpc_core.catalogue import generate
from hpc_core.engines.capture import forget_workspaces, keep_workspaces
from hpc_core.engines.decode.cache import StaticKeyValues
from hpc_core.engines.decode.model import decoder_of
from hpc_core.engines.decode.prefill import (
    FourBit,
    PlainBetween,
    Prefill,
    at_module,
    gated_product,
    pieces_of,
    prefill_product,
)
from hpc_core.engines.decode.program import graph_program
from hpc_core.instruments.allocations import StorageWatch
from hpc_core.instruments.places import following

CPU = torch.device("cpu")


def _model(inner: int, *, seed: int = 1) -> Any:
    config = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=inner,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
    )
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config).eval()


def _prefill(model: Any, batch: int, capacity: int) -> tuple[Prefill, StaticKeyValues]:
    decoder = decoder_of(model)
    cache = StaticKeyValues(decoder, batch, capacity)
    return Prefill(decoder, cache, decoder.turns(capacity), PlainBetween()), cache


@pytest.mark.parametrize("batch", [1, 4, 5, 9])
@pytest.mark.parametrize("padded", [0, 7])
def test_a_prefill_equals_the_models(batch: int, padded: int) -> None:
    """Last hidden states and every real key and value equal transformers', however the rows are divided."""
    model = _model(96)
    prefill, cache = _prefill(model, batch, 96)
    width = 70
    ids = torch.randint(3, 290, (batch, width), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    with torch.no_grad():
        last = prefill(ids, mask if padded else None)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        expected = model.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True)
    torch.testing.assert_close(last, expected.last_hidden_state[:, -1], rtol=1e-4, atol=1e-5)
    assert cache.first.tolist() == [padded] + [0] * (batch - 1)
    for own, layer in zip(cache.layers, expected.past_key_values.layers, strict=True):
        for actual, wanted in ((own.keys, layer.keys), (own.values, layer.values)):
            torch.testing.assert_close(actual[0, :, padded:width], wanted[0, :, padded:], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(actual[1:, :, :width], wanted[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("batch", "rows"), [(1, 1), (4, 1), (32, 8)])
@pytest.mark.parametrize("inner", [32, 1024])
def test_prefill_takes_little_on_top_of_the_cache(inner: int, batch: int, rows: int) -> None:
    """For a quarter of the rows it holds hidden states with either a normed copy and half of gate and up, or q, k and v with a rotated half of q.

    The wide MLP needs the first, the narrow one the second. Only last hidden states are kept from part to part.
    """
    width = 100
    model = _model(inner)
    prefill, cache = _prefill(model, batch, 256)
    decoder = decoder_of(model)
    watch = StorageWatch(("prefill",))
    ids = torch.randint(3, 290, (batch, width))
    watch.own("other", [*model.parameters(), *prefill._turns, cache.whole, ids])
    before = watch.timeline.peak()[1]
    with torch.no_grad(), watch:
        watch("prefill")
        prefill(ids, None)
    hidden, grouped = decoder.hidden, 2 * decoder.groups * decoder.head_width
    each = max(2 * hidden + inner, 3 * hidden + hidden // 2 + grouped)
    needed = rows * width * each * decoder.embedding.element_size()
    last_states = batch * hidden * decoder.embedding.element_size()
    assert needed <= watch.timeline.peak()[1] - before <= 1.01 * needed + last_states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_a_four_bit_matrix_in_pieces_multiplies_as_the_whole(nested: bool, biased: bool, dtype: torch.dtype) -> None:
    """Products by pieces, the last one shorter, equal the layer's, with and without double quantization, in either dtype."""
    torch.manual_seed(3)
    nn = library("bitsandbytes", "4-bit layers").nn
    layer = nn.Linear4bit(
        128, 1100, bias=biased, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=nested
    )
    layer = layer.requires_grad_(False).to("cpu")
    pieces = pieces_of(layer, at_most_weights=512 * 128)
    assert [piece.shape for piece in pieces] == [[512, 128], [512, 128], [76, 128]]
    x, stream = torch.randn(5, 128, dtype=dtype), torch.randn(5, 1100, dtype=dtype)
    whole = library("bitsandbytes", "4-bit layers").functional.dequantize_4bit(layer.weight, layer.weight.quant_state)
    expected = torch.nn.functional.linear(x.float(), whole, layer.bias).to(dtype)
    product = FourBit(layer, pieces)
    torch.testing.assert_close(product(x), expected)
    torch.testing.assert_close(product(x), layer(x))
    added = stream.clone()
    product.add_to(added, x)
    torch.testing.assert_close(added, stream + expected)


def test_gate_and_up_in_pieces_are_those_of_whole_matrices() -> None:
    """Gate and up by equal pieces, by different pieces and by one piece each equal the whole matrices."""
    torch.manual_seed(4)
    nn = library("bitsandbytes", "4-bit layers").nn
    gate, up = (
        nn.Linear4bit(64, 700, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        .requires_grad_(False)
        .to("cpu")
        for _ in range(2)
    )
    x = torch.randn(6, 64)
    expected = torch.nn.functional.silu(gate(x)) * up(x)
    for gate_rows, up_rows in ((256, 256), (256, 512), (1024, 1024)):
        first, second = FourBit(gate, pieces_of(gate, gate_rows * 64)), FourBit(up, pieces_of(up, up_rows * 64))
        torch.testing.assert_close(gated_product(first, second, x, PlainBetween().gated), expected)


def test_pieces_hold_every_row_once() -> None:
    """Pieces have multiples of 256 rows but for the last, within the limit, and a small matrix is one piece."""
    nn = library("bitsandbytes", "4-bit layers").nn
    for rows in (64, 256, 1000, 4096):
        layer = nn.Linear4bit(64, rows, bias=False, compute_dtype=torch.bfloat16).requires_grad_(False).to("cpu")
        for most in (1, 300 * 64, 10**9):
            sizes = [piece.shape[0] for piece in pieces_of(layer, most)]
            assert sum(sizes) == rows
            assert all(size % 256 == 0 for size in sizes[:-1])
            assert all(size <= max(256, most // 64) for size in sizes)
            assert most < 10**9 or len(sizes) == 1


def test_four_bit_layers_are_not_cut_on_a_cpu() -> None:
    """On a CPU 4-bit layers are not cut, because bitsandbytes may repack a weight at its first product."""
    quantization = QuantSpec(kind="nf4", compute_dtype="float32")
    built = build(generate(ModelSpec(shape="tiny", dtype="float32"), quantization=quantization), CPU)
    layer = decoder_of(cast("Any", built.model)).layers[0]
    x = torch.randn(3, 128)
    product = prefill_product(layer.down, torch.float32)
    assert not isinstance(product, FourBit)
    with torch.no_grad():
        assert torch.equal(prefill_product(layer.output, torch.float32)(x), layer.output(x))


def test_products_are_attributed_to_their_modules() -> None:
    """A product that bypasses a module's own call is still counted for, and attributed to, the module."""
    model = _model(96)
    prefill, _ = _prefill(model, 2, 32)
    with torch.no_grad(), following() as places:
        places.learn(model)
        places.begin()
        prefill(torch.randint(3, 290, (2, 20)), None)
        work = places.modules()
    # Two rows are two parts, and each of two layers runs once per part.
    for path in ("self_attn.q_proj", "self_attn.o_proj", "input_layernorm", "mlp.down_proj"):
        assert work[f"model.layers.*.{path}"].calls == 4
    assert places.here() == ""


def test_global_hooks_with_keywords_are_called() -> None:
    """A global hook registered `with_kwargs` is called with empty ones, until its handle is removed."""
    calls: list[Any] = []
    linear = torch.nn.Linear(2, 2)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *given: calls.append(given), with_kwargs=True)
    with at_module(linear):
        assert calls == []
    assert calls == [(linear, (), {}, None)]
    handle.remove()
    with at_module(linear):
        pass
    assert len(calls) == 1


def test_workspaces_are_kept_while_a_graph_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLAS's workspaces are not released while a captured graph uses one."""

    class Graph:
        pass

    called: list[bool] = []
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: called.append(True), raising=False)
    forget_workspaces()
    assert called == [True]
    graph = Graph()
    keep_workspaces(graph)
    forget_workspaces()
    assert called == [True]
    del graph
    gc.collect()
    forget_workspaces()
    assert called == [True, True]


@pytest.mark.parametrize(
    ("prompts", "length", "batch", "why"),
    [
        (2, 40, 1, ""),
        (9, 40, 1, "9 prompts, at most 8"),
        (1, 2047, 1, ""),
        (1, 2048, 1, "parts of 2048"),
        (1, 600, 16, "parts of 2400"),
    ],
)
def test_prefills_that_get_no_graph_say_why(prompts: int, length: int, batch: int, why: str) -> None:
    """A prefill of many or long prompts is not captured, and the reason is known before anything runs."""
    built = build(generate(ModelSpec(shape="tiny", layers=1)), CPU)
    workload = GenerateSpec(engine="graph", prompts=prompts, prompt_length=length, batch=batch, new_tokens=2)
    first = graph_program(built, workload).first_tokens
    assert first.why_not.startswith(why)
    assert first.worth_capturing is (why == "")
