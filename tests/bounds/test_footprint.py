"""Closed forms of bytes equal committed records and freshly built modules."""

from __future__ import annotations

from typing import Any, get_args

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpc_core.bounds.footprint import expected_bytes, kv_bytes_per_token, prompt_lengths, unexplained_bytes
from hpc_core.builders.adapter import adapter_parameters
from hpc_core.builders.assemble import build
from hpc_core.case.case import Case
from hpc_core.case.parts import Dtype, ModelSpec, QuantSpec
from hpc_core.case.shapes import SHAPES
from hpc_core.case.workloads import FinetuneSpec, GenerateSpec
from hpc_core.catalogue import finetune, full, generate, lora, qlora
from hpc_core.engines.decode.cache import capacity_for
from hpc_core.engines.finetune import make_optimizer
from hpc_core.instruments.owners import optimizer_tensors, owned_bytes, weight_tensors
from tests.strategies import adapters, cases, committed_records

CPU = torch.device("cpu")
TINY = ModelSpec(shape="tiny")
QUANTIZATIONS = {
    "nf4": QuantSpec(kind="nf4", compute_dtype="float32"),
    "fp4": QuantSpec(kind="fp4", compute_dtype="bfloat16"),
    "nf4-dq": QuantSpec(kind="nf4", compute_dtype="float32", double_quant=True),
    "int8": QuantSpec(kind="int8", compute_dtype="float16"),
    "nf4-without-mlp": QuantSpec(
        kind="nf4", compute_dtype="float32", skip_modules=("lm_head", "gate_proj", "up_proj", "down_proj")
    ),
}


def test_committed_records_equal_the_closed_forms() -> None:
    """Weights, adapter and optimizer state in every committed record take exactly the expected bytes."""
    compared = 0
    for record in committed_records():
        expected = expected_bytes(record.case)
        for name in ("weights_bytes", "adapter_weights_bytes", "optimizer_bytes"):
            if name in expected and name in record.metrics:
                assert (record.case.id, name, record.metrics[name].value) == (record.case.id, name, expected[name])
                compared += 1
    assert compared >= 28 + 2 * 18


def test_committed_caches_hold_whole_tokens() -> None:
    """The cache at the peak holds at most the tokens of a whole query; the graph engine's holds its capacity."""
    compared = 0
    for record in committed_records():
        expected, held = expected_bytes(record.case), record.metrics.get("at_peak_kv_cache_bytes")
        model, workload = record.case.model, record.case.workload
        if "kv_cache_bytes" not in expected or held is None or model is None or isinstance(workload, FinetuneSpec):
            continue
        assert model.shape is not None
        assert isinstance(workload, GenerateSpec)
        # A layer that appends a token holds its old and new keys or values at once, so this may not be a whole number.
        tokens = held.value / workload.batch / kv_bytes_per_token(SHAPES[model.shape], model.dtype)
        if workload.engine == "graph":
            needed = max(prompt_lengths(workload)) + workload.new_tokens
            whole_steps = -(-needed // workload.cache_step) * workload.cache_step
            before = record.circumstances.started_at < "2026-11-29"
            assert tokens == (whole_steps if before else capacity_for(needed - 1, workload.cache_step))
            continue
        assert 0.9 * min(prompt_lengths(workload)) <= tokens <= max(prompt_lengths(workload)) + workload.new_tokens
        assert held.value <= expected["kv_cache_bytes"]
        compared += 1
    assert compared >= 10


def test_unexplained_bytes_are_measured_minus_expected() -> None:
    """Each category gets its difference; a missing weight measurement counts as zero; a GGUF file has no closed form."""
    case = generate(TINY, prompts=1, prompt_length=24, new_tokens=8, batch=3)
    weights = expected_bytes(case)["weights_bytes"]
    cache_bytes = 3 * 31 * kv_bytes_per_token(SHAPES["tiny"], "bfloat16")
    measured = {"weights_bytes": weights + 12, "kv_cache_bytes": cache_bytes - 1, "peak_bytes": 10**9}
    assert unexplained_bytes(case, measured, cached_tokens=31) == {"weights_bytes": 12, "kv_cache_bytes": -1}
    assert unexplained_bytes(case, {}) == {"weights_bytes": -weights}
    own = ModelSpec(weights="gguf", path="some.gguf", dtype="float32")
    assert unexplained_bytes(generate(own, scale="small", prefix="own"), measured, cached_tokens=31) == {}


WEIGHTS: dict[str, Case] = {
    **{dtype: generate(ModelSpec(shape="tiny", dtype=dtype)) for dtype in get_args(Dtype)},
    **{
        name: generate(ModelSpec(shape="tiny", dtype="float16"), quantization=quantization, variant="quantized")
        for name, quantization in QUANTIZATIONS.items()
    },
    **{
        f"{kind}-prepared": finetune(TINY, qlora(kind=kind, compute_dtype="float16"), prepare=True, batch=2, length=16)
        for kind in ("nf4", "int8")
    },
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_a_built_model(name: str) -> None:
    """A built model's weights, quantization constants included, take what is expected, up to one of two rotary tables."""
    built = owned_bytes(weight_tensors(build(WEIGHTS[name], CPU).model)["weights"])
    expected = expected_bytes(WEIGHTS[name])["weights_bytes"]
    assert 0 <= expected - built <= 4 * SHAPES["tiny"].head_dim


@pytest.mark.parametrize("optimizer", ["adamw-fused", "adamw-foreach"])
@pytest.mark.parametrize("method", [full, lora(), lora(rank=3, targets=("q_proj", "down_proj"))], ids=str)
def test_training_state_of_a_built_model(method: Any, optimizer: Any) -> None:
    """Adapter, gradients and AdamW's state after a step take exactly the expected bytes."""
    case = finetune(TINY, method, variant="state", batch=2, length=16, optimizer=optimizer)
    assert isinstance(case.workload, FinetuneSpec)
    model: Any = build(case, CPU).model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    state = make_optimizer(case.workload, trained)
    ids = torch.arange(3, 35).reshape(2, 16)
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    state.step()
    expected = expected_bytes(case)
    assert owned_bytes(gradients) == expected["gradient_bytes"]
    assert owned_bytes(optimizer_tensors(state)) == expected["optimizer_bytes"]
    assert owned_bytes(adapter_parameters(model).values()) == expected.get("adapter_weights_bytes", 0)


def test_eight_bit_state_is_a_quarter() -> None:
    """8-bit AdamW state takes a quarter of the bytes, within 2 % for a 3B model."""
    case = finetune(ModelSpec(shape="llama-3.2-3b", dtype="float32"), full)
    plain = expected_bytes(case)["optimizer_bytes"]
    small = expected_bytes(case.vary("eight", optimizer="adamw-8bit"))["optimizer_bytes"]
    assert 1 < 4 * small / plain < 1.02


@given(cases())
def test_expected_bytes_are_positive(case: Case) -> None:
    """Any case has positive numbers under known names."""
    known = {"weights_bytes", "adapter_weights_bytes", "gradient_bytes", "optimizer_bytes", "kv_cache_bytes"}
    expected = expected_bytes(case)
    assert set(expected) <= known
    assert all(value > 0 for value in expected.values())


@given(adapters, st.integers(2, 4))
def test_adapter_bytes_are_conserved(adapter: Any, times: int) -> None:
    """Adapter bytes are proportional to the rank, and add up over the targets."""
    case = finetune(TINY, lora(), variant="law")
    case = msgspec.structs.replace(case, adapter=adapter)
    adapter_bytes = expected_bytes(case)["adapter_weights_bytes"]
    more = msgspec.structs.replace(adapter, rank=adapter.rank * times)
    assert expected_bytes(msgspec.structs.replace(case, adapter=more))["adapter_weights_bytes"] == times * adapter_bytes
    parts = [msgspec.structs.replace(adapter, targets=(target,)) for target in adapter.targets]
    shares = [expected_bytes(msgspec.structs.replace(case, adapter=part))["adapter_weights_bytes"] for part in parts]
    assert sum(shares) == adapter_bytes


@given(st.sampled_from(sorted(SHAPES)), st.sampled_from(["nf4", "int8"]))
def test_quantizing_saves_what_it_packs(shape: str, kind: Any) -> None:
    """Fewer bits take fewer bytes, and double quantization saves more where layers are large."""
    model = ModelSpec(shape=shape, dtype="float16")
    quantized = generate(model, quantization=QuantSpec(kind=kind, compute_dtype="float16"), variant="law")
    sizes = [
        expected_bytes(generate(model, quantization=QUANTIZATIONS["nf4"], variant="a"))["weights_bytes"],
        expected_bytes(generate(model, quantization=QUANTIZATIONS["int8"], variant="b"))["weights_bytes"],
        expected_bytes(generate(model))["weights_bytes"],
        expected_bytes(generate(ModelSpec(shape=shape, dtype="float32")))["weights_bytes"],
    ]
    assert sizes == sorted(sizes)
    assert expected_bytes(quantized)["weights_bytes"] in sizes[:2]
    if shape != "tiny":  # there the second table is larger than what it saves
        double = expected_bytes(generate(model, quantization=QUANTIZATIONS["nf4-dq"], variant="c"))["weights_bytes"]
        assert double < sizes[0]
