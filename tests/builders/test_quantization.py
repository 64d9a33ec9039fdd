"""Quantizing in place gives what transformers' `from_pretrained(quantization_config=…)` gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hpc_core.builders.assemble import build
from hpc_core.builders.causal_lm import causal_lm
from hpc_core.builders.quantization import bitsandbytes_config, quantize, quantized_layers
from hpc_core.case.errors import BuildError
from hpc_core.case.parts import ModelSpec, QuantSpec
from hpc_core.case.shapes import SHAPES
from hpc_core.catalogue import finetune, generate, qlora, tiny
from hpc_core.instruments.owners import owned_bytes, weight_tensors

CPU = torch.device("cpu")
IDS = torch.arange(3, 27).reshape(2, 12)
NF4 = QuantSpec(kind="nf4", compute_dtype="float32")
KINDS = {
    "nf4": NF4,
    "nf4-bf16": QuantSpec(kind="nf4", compute_dtype="bfloat16"),
    "fp4": QuantSpec(kind="fp4", compute_dtype="float32"),
    "nf4-dq": QuantSpec(kind="nf4", compute_dtype="float32", double_quant=True),
    "int8": QuantSpec(kind="int8", compute_dtype="float16"),
    "nf4-skip": QuantSpec(kind="nf4", compute_dtype="float32", skip_modules=("lm_head", "down_proj")),
}


def _by_from_pretrained(spec: QuantSpec, dtype: Any, folder: Path) -> torch.nn.Module:
    import transformers

    plain: Any = causal_lm(ModelSpec(shape="tiny", dtype=dtype), CPU)
    plain.save_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=bitsandbytes_config(spec), dtype=getattr(torch, dtype), device_map={"": "cpu"}
    )
    assert isinstance(model, torch.nn.Module)
    layers: dict[str, Any] = dict(quantized_layers(model))
    for layer in layers.values():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # otherwise some CPUs repack the weights
    return model.eval().requires_grad_(False)


def _in_place(spec: QuantSpec, dtype: Any) -> torch.nn.Module:
    return build(generate(ModelSpec(shape="tiny", dtype=dtype), quantization=spec), CPU).model


def _logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    assert isinstance(logits, torch.Tensor)
    return logits


def _storages(model: torch.nn.Module) -> dict[str, tuple[torch.dtype, bytes]]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        name: (tensor.dtype, tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", KINDS)
def test_quantizing_in_place_equals_from_pretrained(name: str, dtype: Any, tmp_path: Path) -> None:
    """Classes, dtypes, bytes of weights and constants, and outputs are equal bit for bit."""
    model, expected = _in_place(KINDS[name], dtype), _by_from_pretrained(KINDS[name], dtype, tmp_path)
    assert {key: type(module) for key, module in model.named_modules()} == {
        key: type(module) for key, module in expected.named_modules()
    }
    assert _storages(model) == _storages(expected)
    before = owned_bytes(weight_tensors(model)["weights"])
    assert before == owned_bytes(weight_tensors(expected)["weights"])
    logits = _logits(model)
    assert logits.isfinite().all()
    assert torch.equal(logits, _logits(expected))
    # int8 layers move their constants in the first forward; their bytes must stay the same.
    assert owned_bytes(weight_tensors(model)["weights"]) == before


@pytest.mark.parametrize("biased", [False, True], ids=["llama", "qwen2"])
@pytest.mark.parametrize("name", [*KINDS, "int4"])
def test_the_same_parameters_require_gradients(name: str, biased: bool, tmp_path: Path) -> None:
    """Weights of quantized layers do not, and their biases do, as in the model that transformers quantizes while loading."""
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    config: Any = transformers.Qwen2Config(**sizes) if biased else transformers.LlamaConfig(**sizes)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    if name == "int4":
        prototype = pytest.importorskip("torchao.prototype.quantization.int4")
        spec = QuantSpec(kind="int4", compute_dtype="bfloat16", group_size=32)
        packing = prototype.PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False)
        how: Any = transformers.TorchAoConfig(packing, modules_to_not_convert=["lm_head"])
    else:
        spec = KINDS[name]
        how = bitsandbytes_config(spec)
    expected: Any = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=how, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    model = build(generate(ModelSpec(weights="config", path=str(tmp_path)), quantization=spec), CPU).model
    required = {key: part.requires_grad for key, part in model.named_parameters()}
    assert required == {key: part.requires_grad for key, part in expected.named_parameters()}
    assert biased is any(key.endswith("q_proj.bias") and needs for key, needs in required.items())


@pytest.mark.parametrize("name", KINDS)
def test_every_layer_has_the_requested_settings(name: str) -> None:
    """Every layer has the requested quantization type, compute dtype and double quantization."""
    spec = KINDS[name]
    layers = quantized_layers(_in_place(spec, "bfloat16"))
    assert len(layers) == 3 * (7 - (len(spec.skip_modules) - 1))
    for layer in layers.values():
        weight: Any = layer.weight
        if spec.kind == "int8":
            assert weight.dtype == torch.int8
        else:
            assert (weight.quant_type, weight.quant_state.nested, layer.compute_dtype) == (
                spec.kind, spec.double_quant, getattr(torch, spec.compute_dtype),
            )  # fmt: skip


def test_a_model_without_the_linear_layers_is_refused() -> None:
    """Quantizing a model without linear layers is an error."""
    model = causal_lm(tiny, CPU)
    everything = QuantSpec(
        kind="nf4", compute_dtype="float32", skip_modules=("lm_head", *SHAPES["tiny"].linear_shapes())
    )
    with pytest.raises(BuildError, match=r"nf4 quantized nothing: .*skip_modules \(lm_head, q_proj"):
        quantize(model, everything, CPU)


def test_a_layer_left_unquantized_is_refused() -> None:
    """A layer that was not quantized is an error with its name and their number."""
    model = build(generate(tiny, quantization=NF4), CPU).model
    owner = model.get_submodule("model.layers.1.mlp")
    owner.down_proj = torch.nn.Linear(256, 128, bias=False)
    with pytest.raises(
        BuildError, match=r"left 1 of 21 linear layers as they were, first \['model.layers.1.mlp.down_proj'\]"
    ):
        quantize(model, NF4, CPU)


def _gradients(*, evaluated: bool, portable: bool = True) -> dict[str, torch.Tensor]:
    """Gradients of the adapter's B matrices (those of A are zero at first), after an evaluation if `evaluated`."""
    model = build(finetune(tiny, qlora(dropout=0.0)), CPU).model
    if not portable:
        for layer in quantized_layers(model).values():
            layer.support_avx512bf16_for_cpu = True  # type: ignore[assignment]
    if evaluated:
        model.eval()
        _logits(model)
        model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    named = model.named_parameters()
    return {name: parameter.grad for name, parameter in named if ".lora_B" in name and parameter.grad is not None}


def test_training_after_an_evaluation_gives_the_same_gradients() -> None:
    """With our guard, an evaluation before the step does not change any adapter gradient."""
    fresh, after = _gradients(evaluated=False), _gradients(evaluated=True)
    assert len(fresh) == len(after) == 12
    assert all(bool(gradient.any()) for gradient in fresh.values())
    assert all(torch.equal(gradient, after[name]) for name, gradient in fresh.items())


def test_without_the_guard_gradients_stop_on_some_cpus() -> None:
    """Without the guard, bitsandbytes repacks weights in an evaluation, and the backward pass fails."""
    functional = pytest.importorskip("bitsandbytes.functional")
    if not functional.has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16, where bitsandbytes does not repack its weights")
    with pytest.warns(UserWarning, match="bitsandbytes::gemv_4bit: an autograd kernel was not registered"):
        gradients = _gradients(evaluated=True, portable=False)
    stopped = [name for name, gradient in gradients.items() if not bool(gradient.any())]
    assert len(stopped) == 9  # of q, k and v in three layers; the output projections' are wrong
