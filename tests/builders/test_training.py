"""Adapters, peft's preparation and gradient checkpointing."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from hpc_core.audit.forwards import count_layer_forwards
from hpc_core.bounds.adapter import layer_tensors, tensor_sizes
from hpc_core.builders.adapter import adapter_parameters
from hpc_core.builders.assemble import build
from hpc_core.case.errors import BuildError
from hpc_core.case.parts import ModelSpec
from hpc_core.case.shapes import SHAPES
from hpc_core.catalogue import finetune, full, lora, qlora, tiny

CPU = torch.device("cpu")
IDS = torch.arange(3, 131).reshape(2, 64)
FLOAT = ModelSpec(shape="tiny", dtype="float32")
EVERY_LINEAR = tuple(SHAPES["tiny"].linear_shapes())


@pytest.mark.parametrize(("dtype", "quantized"), [("float32", True), ("bfloat16", True), ("float16", False)])
def test_adapter_weights_have_the_requested_dtype(dtype: Any, quantized: bool) -> None:
    """LoRA weights have the requested dtype, whatever the base's dtype and quantization."""
    method = qlora(dtype=dtype) if quantized else lora(dtype=dtype)
    parameters = adapter_parameters(build(finetune(tiny, method), CPU).model)
    assert {parameter.dtype for parameter in parameters.values()} == {getattr(torch, dtype)}


@pytest.mark.parametrize(("rank", "targets"), [(1, ("q_proj", "v_proj")), (8, EVERY_LINEAR)])
def test_only_the_adapter_is_trainable_and_its_tensors_are_the_described_ones(
    rank: int, targets: tuple[str, ...]
) -> None:
    """peft builds the tensors that bounds/adapter.py describes, in every layer, and nothing else is trainable."""
    case = finetune(tiny, lora(rank=rank, targets=targets))
    model, shape = build(case, CPU).model, SHAPES["tiny"]
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable.keys() == adapter_parameters(model).keys()
    assert case.adapter is not None
    described = Counter(
        (target, name, size)
        for target in targets
        for name, size in layer_tensors(case.adapter, *shape.linear_shapes()[target]).items()
        for _ in range(shape.num_hidden_layers)
    )
    parts = {name: name.removesuffix(".default.weight").split(".") for name in trainable}
    assert Counter((*parts[name][-2:], tuple(part.shape)) for name, part in trainable.items()) == described
    assert sum(part.numel() for part in trainable.values()) == sum(tensor_sizes(case.adapter, shape))


def test_the_adapters_settings_reach_peft() -> None:
    """peft's scaling is alpha over rank, and its dropout is the requested one."""
    model = build(finetune(tiny, lora(rank=4, alpha=32, dropout=0.25)), CPU).model
    layer: Any = next(module for name, module in model.named_modules() if name.endswith("layers.0.self_attn.q_proj"))
    assert layer.scaling["default"] == 8.0
    assert layer.lora_dropout["default"].p == 0.25


def test_a_new_adapter_changes_no_output() -> None:
    """A new adapter changes no output, and the case's seed draws its weights."""
    case = finetune(FLOAT, lora(dropout=0.0))
    plain, wrapped = build(finetune(FLOAT), CPU).model, build(case, CPU).model
    with torch.no_grad():
        torch.testing.assert_close(wrapped(input_ids=IDS).logits, plain(input_ids=IDS).logits, rtol=0, atol=1e-6)
    other = build(case.vary("lora-seed", seed=1), CPU).model
    drawn = [adapter_parameters(model) for model in (wrapped, other)]
    assert any(not torch.equal(value, drawn[1][name]) for name, value in drawn[0].items())


def test_an_unknown_target_is_refused() -> None:
    """A target that matches no module is refused, alone or among others."""
    with pytest.raises(BuildError, match=r"peft cannot attach lora to c_attn"):
        build(finetune(tiny, lora(targets=("c_attn",))), CPU)
    with pytest.raises(BuildError, match=r"No module was named c_attn"):
        build(finetune(tiny, lora(targets=("q_proj", "c_attn"))), CPU)


@pytest.mark.parametrize(
    ("prepare", "checkpointing", "norms", "on"),
    [
        (False, "off", torch.bfloat16, False),
        (True, "off", torch.float32, False),
        (True, "as-prepare-leaves-it", torch.float32, True),
        (True, "non-reentrant", torch.float32, True),
        (True, "reentrant", torch.float32, True),
    ],
)
def test_what_prepare_leaves(prepare: bool, checkpointing: Any, norms: torch.dtype, on: bool) -> None:
    """peft's preparation makes everything unquantized float32, and enables checkpointing unless it is off."""
    model = build(finetune(tiny, qlora(), prepare=prepare, checkpointing=checkpointing), CPU).model
    rest = {name: p.dtype for name, p in model.named_parameters() if ".lora_" not in name and "proj" not in name}
    assert len(rest) == 8  # embeddings (tied to the head), two norms a layer, the last norm
    assert set(rest.values()) == {norms}
    assert (_forwards(model) == 6) is on


def _forwards(model: torch.nn.Module) -> int:
    with count_layer_forwards(model) as forwards:
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert forwards.layers == 3
    return forwards.count


def _loss_and_gradients(model: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.detach(), {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }


@pytest.mark.parametrize(
    ("method", "checkpointing"),
    [
        (full, "non-reentrant"),
        (lora(dropout=0.3), "reentrant"),
        (lora(dropout=0.3), "non-reentrant"),
        (qlora(dropout=0.0), "reentrant"),
    ],
    ids=["full", "dropout-reentrant", "dropout", "qlora-reentrant"],
)
def test_checkpointing_recomputes_every_layer_and_changes_no_number(method: Any, checkpointing: Any) -> None:
    """Each layer runs twice, and loss and gradients are equal bit for bit, with dropout too."""
    plain = build(finetune(FLOAT, method), CPU).model
    model = build(finetune(FLOAT, method, checkpointing=checkpointing), CPU).model
    assert _forwards(plain) == 3
    assert _forwards(model) == 6
    for each in (plain, model):
        each.zero_grad()
    (loss, gradients), (again, recomputed) = _loss_and_gradients(plain), _loss_and_gradients(model)
    assert torch.equal(loss, again)
    assert gradients.keys() == recomputed.keys()
    assert len(gradients) >= 24
    assert all(torch.equal(gradient, recomputed[name]) for name, gradient in gradients.items())
