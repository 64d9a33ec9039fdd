"""Closed forms of FLOPs and bytes equal what is counted in a real run."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from hpc_core.bounds.cost import decode_bytes, forward_flops, train_flops
from hpc_core.builders.assemble import build
from hpc_core.builders.causal_lm import model_config
from hpc_core.case.parts import ModelSpec
from hpc_core.case.shapes import SHAPES, Shape
from hpc_core.catalogue import finetune, full, lora, qlora
from hpc_core.instruments.counters import counting
from hpc_core.instruments.owners import cache_tensors, owned_bytes, weight_tensors

CPU = torch.device("cpu")
TINY = SHAPES["tiny"]
LINEAR = tuple(TINY.linear_shapes())
QWEN = Shape(
    architecture="qwen2",
    hidden_size=96,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=512,
    tie_word_embeddings=False,
    attention_bias=True,
    max_position_embeddings=512,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
)


def _model(shape: Shape, attention: str = "sdpa") -> Any:
    import transformers

    config = model_config(shape, "float32", attention)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shape", [TINY, QWEN], ids=["tiny", "qwen"])
def test_forward_flops_are_those_counted(shape: Shape, attention: str) -> None:
    """The closed form of prefill, of prefill with one logit and of a decoded token is exact."""
    model = _model(shape, attention).eval()
    ids = torch.arange(3, 37).reshape(2, 17)
    with torch.no_grad():
        with counting() as whole:
            model(input_ids=ids)
        with counting() as prefill:
            cache = model(input_ids=ids, logits_to_keep=1, use_cache=True).past_key_values
        with counting() as decode:
            # transformers 5.24 calls it cache, 5.17 past_key_values.
            name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
            model(input_ids=ids[:, :1], **{name: cache})
    assert whole.flops == forward_flops(shape, 2, 17)
    assert prefill.flops == forward_flops(shape, 2, 17, logits=1)
    assert decode.flops == forward_flops(shape, 2, 1, past=17)


def _trained(model: torch.nn.Module) -> int:
    ids = torch.arange(3, 67).reshape(2, 32)
    with counting() as counts:
        model(input_ids=ids, labels=ids).loss.backward()
    return counts.flops


@pytest.mark.parametrize("shape", [TINY, QWEN], ids=["tiny", "qwen"])
def test_full_training_flops_are_those_counted(shape: Shape) -> None:
    """The closed form of training every weight is exact."""
    assert _trained(_model(shape).train()) == train_flops(shape, 2, 32, None)


@pytest.mark.parametrize(
    "targets",
    [
        ("q_proj", "k_proj", "v_proj", "o_proj"),
        ("q_proj", "v_proj"),
        ("o_proj",),
        ("gate_proj", "down_proj"),
        ("down_proj",),
        LINEAR,
    ],
    ids="-".join,
)
def test_adapter_training_flops_are_those_counted(targets: tuple[str, ...]) -> None:
    """Frozen weights cost no weight gradient, and no input gradient before the first adapter."""
    case = finetune(ModelSpec(shape="tiny", dtype="float32"), lora(rank=3, targets=targets, dropout=0.0))
    assert _trained(build(case, CPU).model) == train_flops(TINY, 2, 32, case.adapter)


@pytest.mark.parametrize("method", [qlora(), qlora(kind="int8", compute_dtype="float16")], ids=["nf4", "int8"])
def test_quantized_training_counts_as_unquantized(method: Any) -> None:
    """bitsandbytes' products count like any matrix product."""
    case = finetune(ModelSpec(shape="tiny", dtype="bfloat16"), method)
    assert _trained(build(case, CPU).model) == train_flops(TINY, 2, 32, case.adapter)


def test_recomputation_is_not_needed_work() -> None:
    """Recomputation is counted when it runs, and is not in the closed form."""
    plain = finetune(ModelSpec(shape="tiny", dtype="float32"), full)
    counted = _trained(build(plain.vary("full-gc", checkpointing="reentrant"), CPU).model)
    layers = forward_flops(TINY, 2, 32) - 2 * 64 * TINY.vocab_size * TINY.hidden_size
    assert counted == train_flops(TINY, 2, 32, None) + layers


def test_full_training_costs_three_forwards() -> None:
    """Apart from attention, training takes three times the FLOPs of a forward, at any batch."""
    forward = forward_flops(TINY, 4, 1)
    assert 3 * forward < train_flops(TINY, 4, 1, None) < 3.01 * forward
    assert train_flops(TINY, 8, 64, None) == 2 * train_flops(TINY, 4, 64, None)


@pytest.mark.parametrize("shape", [TINY, QWEN], ids=["tiny-tied", "qwen-untied"])
def test_decode_reads_every_weight_once_and_the_cache(shape: Shape) -> None:
    """A decoded token reads each weight once, except an untied embedding table, and the cache."""
    model = _model(shape).eval()
    ids = torch.arange(3, 37).reshape(2, 17)
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    parameters = owned_bytes(model.parameters())
    embedding = shape.vocab_size * shape.hidden_size * 4
    cache_bytes = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * 17 * 2 * 4
    assert owned_bytes(cache_tensors(cache)) == cache_bytes
    needed = decode_bytes(parameters, embedding, shape.tie_word_embeddings, cache_bytes)
    read = 4 * (shape.parameter_count() - (0 if shape.tie_word_embeddings else shape.vocab_size * shape.hidden_size))
    assert needed == read + cache_bytes
    assert owned_bytes(weight_tensors(model)["weights"]) - parameters < 4096  # rotary tables
