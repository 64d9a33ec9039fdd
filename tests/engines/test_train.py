"""The tuned training program equals the stock one and float64; its options, its memory budget, and what it refuses."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hpc_core.builders.assemble import build
from hpc_core.case.case import Case
from hpc_core.case.errors import BuildError
from hpc_core.case.parts import DataSpec, ModelSpec
from hpc_core.case.workloads import FinetuneSpec
from hpc_core.catalogue import finetune, full, lora, qlora
from hpc_core.engines.tuned.forward import restore, tune
from hpc_core.engines.tuned.pointwise import Pointwise
from hpc_core.engines.tuned.projection import projection_of
from hpc_core.instruments.counters import own_formulas
from hpc_core.instruments.owners import owned_bytes
from tests.engines.conftest import losses_of, program_of, small_qwen2, tuned_program_of

CPU = torch.device("cpu")
FLOAT = ModelSpec(shape="tiny", dtype="float32")
METHODS = {
    "full": full,
    "lora": lora(dropout=0.0, targets=("q_proj", "o_proj", "up_proj", "down_proj")),
    "qlora": qlora(compute_dtype="float32", dropout=0.0),
}
LOSS: dict[str, Any] = {"engine": "tuned", "loss": "chunked", "loss_chunk": 24}
BLOCKS: dict[str, Any] = {**LOSS, "fusion": "blocks"}
IN_BACKWARD: dict[str, Any] = {**BLOCKS, "optimizer_in_backward": True}
LINEARS: dict[str, Any] = {"engine": "tuned", "fusion": "linears"}
SHORT: dict[str, Any] = {"batch": 2, "length": 32, "steps": 3, "learning_rate": 1e-3}


def _losses(case: Case, steps: int = 20) -> list[float]:
    return losses_of(program_of(case), steps)


@pytest.mark.parametrize(
    ("method", "switches"),
    [
        *((name, BLOCKS) for name in METHODS),
        ("full", IN_BACKWARD),
        ("lora", IN_BACKWARD),
        ("lora", LOSS),
        ("lora", LINEARS),
        ("qlora", LINEARS),
        ("full", {"engine": "tuned"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_twenty_steps_are_those_of_the_stock_path(method: str, switches: dict[str, Any]) -> None:
    """In float32 the losses of twenty steps equal the stock program's to 1e-5, the difference of other orders of summation."""
    stock = _losses(finetune(FLOAT, METHODS[method], **SHORT))
    tuned = _losses(finetune(FLOAT, METHODS[method], **SHORT, **switches))
    assert tuned == pytest.approx(stock, rel=1e-5)
    assert stock[-1] < stock[0]


def _gradients(model: torch.nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    torch.autograd.backward(model(input_ids=ids, labels=labels).loss)
    return {name: part.grad for name, part in model.named_parameters() if part.grad is not None}


def _fill_lora_b(model: torch.nn.Module) -> None:
    """Fill LoRA's B, whose initial zeros hide the gradient of A."""
    torch.manual_seed(3)
    for name, part in model.named_parameters():
        if "lora_B" in name:
            part.data.normal_(std=0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_gradients_are_those_of_float64(method: str, dtype: str) -> None:
    """In float32 every gradient of the fused halves is within 1e-5 of the libraries' in float64.

    In bfloat16 the largest error is at most 1.5 times that of the libraries' own bfloat16.
    """
    model = msgspec.structs.replace(FLOAT, dtype=dtype)
    case = finetune(model, METHODS[method], **SHORT, **BLOCKS)
    assert isinstance(case.workload, FinetuneSpec)
    ids = torch.randint(0, 1024, (2, 32), generator=torch.Generator().manual_seed(5))
    labels = ids.masked_fill(torch.arange(32) % 7 == 3, -100)
    gradients = {}
    for kind in ("exact", "stock", "tuned"):
        built = build(case, CPU).model
        _fill_lora_b(built)
        if kind == "exact":
            built.double()
        if kind == "tuned":
            tune(built, case.workload, Pointwise(compiled=False))
        gradients[kind] = _gradients(built, ids, labels)
    errors = {kind: _largest_error(gradients[kind], gradients["exact"]) for kind in ("stock", "tuned")}
    assert set(gradients["tuned"]) == set(gradients["exact"])
    assert errors["tuned"] < (1e-5 if dtype == "float32" else 1.5 * errors["stock"])


def _largest_error(gradients: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """The largest relative error of any gradient, by norm."""
    return max(float((gradients[name].double() - exact[name]).norm() / exact[name].norm()) for name in exact)


def test_biases_of_projections_are_trained() -> None:
    """Qwen2's biases of queries, keys and values get the libraries' gradients in float64, except for norms in float32."""
    model = small_qwen2(seed=0).double().train()
    ids = torch.randint(0, 300, (2, 16))
    exact = _gradients(model, ids, ids)
    model.zero_grad(set_to_none=True)
    workload = FinetuneSpec(**SHORT, **BLOCKS)
    tune(model, workload, Pointwise(compiled=False))
    assert _largest_error(_gradients(model, ids, ids), exact) < 2e-6


def test_halves_computed_again_change_no_gradient() -> None:
    """If every half is recomputed, gradients are equal bit for bit, and each attention runs twice."""
    case = finetune(FLOAT, METHODS["lora"], **SHORT, **BLOCKS)
    assert isinstance(case.workload, FinetuneSpec)
    ids = torch.randint(0, 1024, (2, 32), generator=torch.Generator().manual_seed(5))
    gradients, entered = [], []
    for again in (False, True):
        built = build(case, CPU).model
        _fill_lora_b(built)
        forward = tune(built, case.workload, Pointwise(compiled=False))
        for half in forward.halves:
            half.again = again
        forward.halves[0].module.register_forward_pre_hook(lambda *_, again=again: entered.append(again))
        gradients.append(_gradients(built, ids, ids))
    assert entered == [False, True, True]
    assert all(torch.equal(gradients[1][name], gradients[0][name]) for name in gradients[0])


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_half_computed_again_is_its_forward_without_the_last_product(method: str) -> None:
    """Recomputing a half takes exactly the FLOPs of its forward without `o_proj` or `down_proj`, except for their adapter's A."""
    case = finetune(FLOAT, METHODS[method], **SHORT, **BLOCKS)
    program = tuned_program_of(case)
    layers = program.forward.decoder.layers
    rows, length = 2 * 32, 32
    attention, mlp = layers[0].self_attn, layers[0].mlp

    def product(part: Any, *, last: bool = False) -> int:
        inner, outer = int(part.in_features), int(part.out_features)
        rank = int(part.r["default"]) if hasattr(part, "lora_A") else 0
        return 2 * rows * (rank * inner if last else inner * outer + rank * (inner + outer))

    expected = {
        "attention": 4 * rows * length * attention.q_proj.out_features
        + sum(map(product, (attention.q_proj, attention.k_proj, attention.v_proj)))
        + product(attention.o_proj, last=True),
        "mlp": product(mlp.gate_proj) + product(mlp.up_proj) + product(mlp.down_proj, last=True),
    }
    flops = {}
    for again in ("", "attention", "mlp"):
        for half in program.forward.halves:
            half.again = half.name == again
        with FlopCounterMode(display=False, custom_mapping=own_formulas()) as counted:
            program.step()
        flops[again] = counted.get_total_flops()
    for name, per_layer in expected.items():
        assert flops[name] - flops[""] == len(layers) * per_layer, name


def test_a_smaller_budget_takes_less_memory_and_keeps_the_losses() -> None:
    """A smaller budget recomputes some halves and gives the same losses; one that is too small is refused."""
    case = finetune(FLOAT, METHODS["lora"], **{**SHORT, "length": 64}, **BLOCKS)
    most = tuned_program_of(case.vary("roomy", budget_bytes=2**33))
    assert most.plan is not None
    assert (most.plan.attentions, most.plan.mlps) == (0, 0)
    tight = case.vary("tight", budget_bytes=most.plan.peak_bytes - 200_000)
    program = tuned_program_of(tight)
    assert program.plan is not None
    again = [half.name for half in program.forward.halves if half.again]
    assert len(again) == program.plan.attentions + program.plan.mlps > 0
    assert _losses(tight, 5) == _losses(case, 5)
    with pytest.raises(BuildError, match="is too small"):
        tuned_program_of(case.vary("none", budget_bytes=1000))


def test_padding_needs_no_mask() -> None:
    """Rows padded on the right give the stock losses without a mask, since no real token attends to padding."""
    data = DataSpec(source="trace", name="gsm8k", rows=40)
    padded: dict[str, Any] = {**SHORT, "batch": 4, "length": 300, "data": data, "padding": "longest"}
    stock = _losses(finetune(FLOAT, METHODS["lora"], **padded), 3)
    assert _losses(finetune(FLOAT, METHODS["lora"], **padded, **BLOCKS), 3) == pytest.approx(stock, rel=1e-5)


def test_a_graph_falls_back_without_a_gpu() -> None:
    """Without a GPU the program trains without a graph, and says why."""
    program = tuned_program_of(finetune(FLOAT, METHODS["lora"], **SHORT, **LOSS, graph=True))
    program.step()
    assert program.fallen == {"graph": "off: a CUDA graph needs a GPU"}
    assert program.captured is None


def test_a_restored_model_is_the_libraries_own_again() -> None:
    """After `restore` no module has a forward of ours, and the logits are those of an untouched model."""
    case = finetune(FLOAT, METHODS["qlora"], **SHORT, **BLOCKS)
    assert isinstance(case.workload, FinetuneSpec)
    model, untouched = build(case, CPU).model, build(case, CPU).model
    tune(model, case.workload, Pointwise(compiled=False))
    restore(model)
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]
    ids = torch.arange(64).view(2, 32)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, untouched(input_ids=ids).logits)


def test_unsupported_models_are_refused() -> None:
    """Dropout, another architecture, and layers with nothing to fuse are refused with the alternative."""
    transformers = pytest.importorskip("transformers")
    workload = FinetuneSpec(**SHORT, **BLOCKS)
    dropping = build(finetune(FLOAT, lora(dropout=0.1), **SHORT), CPU).model
    with pytest.raises(BuildError, match="without dropout"):
        tune(dropping, workload, Pointwise(compiled=False))
    small: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 32}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    other = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**small, **heads))
    with pytest.raises(BuildError, match="differs in q_norm, k_norm"):
        tune(other, workload, Pointwise(compiled=False))
    plain = build(finetune(FLOAT, full, **SHORT), CPU).model
    with pytest.raises(BuildError, match="nothing would be fused"):
        tune(plain, FinetuneSpec(**SHORT, **LINEARS), Pointwise(compiled=False))


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_frozen_query_key_and_value_weights_share_one_storage(method: str) -> None:
    """Frozen weights move into one storage without using more bytes, and each module still works; trained ones stay separate."""
    case = finetune(FLOAT, METHODS[method], **SHORT, **BLOCKS)
    assert isinstance(case.workload, FinetuneSpec)
    model: Any = build(case, CPU).model
    bytes_before = owned_bytes(model.parameters())
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    attention = causal.model.layers[0].self_attn
    names = ("q_proj", "k_proj", "v_proj")
    x = torch.randn(3, attention.q_proj.in_features, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = [getattr(attention, name)(x) for name in names]
        tune(model, case.workload, Pointwise(compiled=False))
        after = [getattr(attention, name)(x) for name in names]
    assert all(torch.equal(left, right) for left, right in zip(before, after, strict=True))
    assert owned_bytes(model.parameters()) == bytes_before
    weights = [projection_of(getattr(attention, name)).weight for name in names]
    storages = {each.untyped_storage().data_ptr() for each in weights if each is not None}
    assert len(storages) == {"lora": 1, "qlora": 0, "full": 3}[method]
    model(input_ids=torch.arange(64).view(2, 32), labels=torch.arange(64).view(2, 32)).loss.backward()
    whole = method != "full"
    halves = causal.forward.halves
    assert (causal.forward.run.called["rotate_and_join"] == len(halves) // 2) is whole
