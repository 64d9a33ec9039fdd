"""The tuned training program against the stock one and against float64; its switches, its budget, and what it refuses."""

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
from hpc_core.engines.finetune import FinetuneProgram
from hpc_core.engines.tuned.forward import restore, tune
from hpc_core.engines.tuned.pointwise import Pointwise
from hpc_core.engines.tuned.program import TunedProgram, training_program
from hpc_core.engines.tuned.projection import projection_of
from hpc_core.instruments.counters import own_formulas
from hpc_core.instruments.owners import owned_bytes

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


def _program(case: Case) -> FinetuneProgram:
    assert isinstance(case.workload, FinetuneSpec)
    return training_program(build(case, CPU), case, case.workload)


def _losses(case: Case, steps: int = 20) -> list[float]:
    program = _program(case)
    found = []
    for _ in range(steps):
        program.step()
        assert program.loss is not None
        found.append(float(program.loss))
    return found


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
    """In float32 the losses of twenty steps are the stock program's to 1e-5: sums in another order, through Adam, and nothing else."""
    stock = _losses(finetune(FLOAT, METHODS[method], **SHORT))
    tuned = _losses(finetune(FLOAT, METHODS[method], **SHORT, **switches))
    assert tuned == pytest.approx(stock, rel=1e-5)
    assert stock[-1] < stock[0]


def _gradients(model: torch.nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    torch.autograd.backward(model(input_ids=ids, labels=labels).loss)
    return {name: part.grad for name, part in model.named_parameters() if part.grad is not None}


def _lively(model: torch.nn.Module) -> None:
    """LoRA's B starts at zero, which hides A's gradient; every B gets values."""
    torch.manual_seed(3)
    for name, part in model.named_parameters():
        if "lora_B" in name:
            part.data.normal_(std=0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_gradients_are_those_of_float64(method: str, dtype: str) -> None:
    """Every gradient of the fused halves is near that of the libraries' own forward in float64: within 1e-5 in float32; in bfloat16
    no more than 1.5 times as far as the libraries' own bfloat16 is, over all gradients by norm.
    """
    model = msgspec.structs.replace(FLOAT, dtype=dtype)
    case = finetune(model, METHODS[method], **SHORT, **BLOCKS)
    assert isinstance(case.workload, FinetuneSpec)
    ids = torch.randint(0, 1024, (2, 32), generator=torch.Generator().manual_seed(5))
    labels = ids.masked_fill(torch.arange(32) % 7 == 3, -100)
    found = {}
    for kind in ("exact", "stock", "tuned"):
        built = build(case, CPU).model
        _lively(built)
        if kind == "exact":
            built.double()
        if kind == "tuned":
            tune(built, case.workload, Pointwise(compiled=False))
        found[kind] = _gradients(built, ids, labels)
    errors = {kind: _off(found[kind], found["exact"]) for kind in ("stock", "tuned")}
    assert set(found["tuned"]) == set(found["exact"])
    assert errors["tuned"] < (1e-5 if dtype == "float32" else 1.5 * errors["stock"])


def _off(seen: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """The largest relative error of any gradient, by norm."""
    return max(float((seen[name].double() - exact[name]).norm() / exact[name].norm()) for name in exact)


def test_biases_of_projections_learn_too() -> None:
    """Qwen2's biases on queries, keys and values get the gradient of the libraries' own forward in float64, whose norms are in float32."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(config).double().train()
    for name, part in model.named_parameters():
        if name.endswith("bias"):
            part.data.normal_(std=0.3)
    ids = torch.randint(0, 96, (2, 16))
    exact = _gradients(model, ids, ids)
    model.zero_grad(set_to_none=True)
    workload = FinetuneSpec(**SHORT, **BLOCKS)
    tune(model, workload, Pointwise(compiled=False))
    assert _off(_gradients(model, ids, ids), exact) < 2e-6


def test_halves_computed_again_change_no_gradient() -> None:
    """With every half computed again gradients are equal to the bit, and each attention is entered twice."""
    case = finetune(FLOAT, METHODS["lora"], **SHORT, **BLOCKS)
    assert isinstance(case.workload, FinetuneSpec)
    ids = torch.randint(0, 1024, (2, 32), generator=torch.Generator().manual_seed(5))
    found, entered = [], []
    for again in (False, True):
        built = build(case, CPU).model
        _lively(built)
        forward = tune(built, case.workload, Pointwise(compiled=False))
        for half in forward.halves:
            half.again = again
        forward.halves[0].module.register_forward_pre_hook(lambda *_, again=again: entered.append(again))
        found.append(_gradients(built, ids, ids))
    assert entered == [False, True, True]
    assert all(torch.equal(found[1][name], found[0][name]) for name in found[0])


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_half_computed_again_is_its_forward_without_the_last_product(method: str) -> None:
    """To the FLOP: neither `o_proj` nor `down_proj` is multiplied with again; an adapter's A, whose product the backward reads, is."""
    case = finetune(FLOAT, METHODS[method], **SHORT, **BLOCKS)
    program = _program(case)
    assert isinstance(program, TunedProgram)
    layers = program.forward.decoder.layers
    rows, length = 2 * 32, 32
    attention, mlp = layers[0].self_attn, layers[0].mlp

    def product(part: Any, *, last: bool = False) -> int:
        inner, outer = int(part.in_features), int(part.out_features)
        rank = int(part.r["default"]) if hasattr(part, "lora_A") else 0
        return 2 * rows * (rank * inner if last else inner * outer + rank * (inner + outer))

    wanted = {
        "attention": 4 * rows * length * attention.q_proj.out_features
        + sum(map(product, (attention.q_proj, attention.k_proj, attention.v_proj)))
        + product(attention.o_proj, last=True),
        "mlp": product(mlp.gate_proj) + product(mlp.up_proj) + product(mlp.down_proj, last=True),
    }
    found = {}
    for again in ("", "attention", "mlp"):
        for half in program.forward.halves:
            half.again = half.name == again
        with FlopCounterMode(display=False, custom_mapping=own_formulas()) as counted:
            program.step()
        found[again] = counted.get_total_flops()
    assert {name: found[name] - found[""] for name in wanted} == {
        name: len(layers) * one for name, one in wanted.items()
    }


def test_a_smaller_budget_takes_less_memory_and_keeps_the_losses() -> None:
    """A budget between the least and the most gives a plan that recomputes some halves, the same losses, and is refused below the least."""
    case = finetune(FLOAT, METHODS["lora"], **{**SHORT, "length": 64}, **BLOCKS)
    most = _program(case.vary("roomy", budget_bytes=2**33))
    assert isinstance(most, TunedProgram)
    assert most.plan is not None
    assert (most.plan.attentions, most.plan.mlps) == (0, 0)
    tight = case.vary("tight", budget_bytes=most.plan.peak_bytes - 200_000)
    program = _program(tight)
    assert isinstance(program, TunedProgram)
    assert program.plan is not None
    again = [half.name for half in program.forward.halves if half.again]
    assert len(again) == program.plan.attentions + program.plan.mlps > 0
    assert _losses(tight, 5) == _losses(case, 5)
    with pytest.raises(BuildError, match="is too small"):
        _program(case.vary("none", budget_bytes=1000))


def test_padding_needs_no_mask() -> None:
    """Rows padded on the right give the stock losses without any mask: no real token sees padding, and padding has no label."""
    data = DataSpec(source="trace", name="gsm8k", rows=40)
    padded: dict[str, Any] = {**SHORT, "batch": 4, "length": 300, "data": data, "padding": "longest"}
    stock = _losses(finetune(FLOAT, METHODS["lora"], **padded), 3)
    assert _losses(finetune(FLOAT, METHODS["lora"], **padded, **BLOCKS), 3) == pytest.approx(stock, rel=1e-5)


def test_a_graph_falls_back_by_name_where_there_is_no_gpu() -> None:
    """The program trains on without it and says why; it captures nothing."""
    program = _program(finetune(FLOAT, METHODS["lora"], **SHORT, **LOSS, graph=True))
    assert isinstance(program, TunedProgram)
    program.step()
    assert program.fallen == {"graph": "off: a CUDA graph needs a GPU"}
    assert program.captured is None


def test_a_restored_model_is_the_libraries_own_again() -> None:
    """After `restore` no module has a forward of ours, and the loss is that of an untouched model."""
    case = finetune(FLOAT, METHODS["qlora"], **SHORT, **BLOCKS)
    assert isinstance(case.workload, FinetuneSpec)
    model, untouched = build(case, CPU).model, build(case, CPU).model
    tune(model, case.workload, Pointwise(compiled=False))
    restore(model)
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]
    ids = torch.arange(64).view(2, 32)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, untouched(input_ids=ids).logits)


def test_models_that_the_switches_do_not_know_are_refused() -> None:
    """An adapter with dropout, layers of another architecture, and linears with nothing to fuse are errors that name the way out."""
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
def test_queries_keys_and_values_are_one_product_where_nobody_trains_their_weights(method: str) -> None:
    """Frozen weights move into one storage, no byte is held twice, and each module still multiplies with its own; trained ones stay apart."""
    case = finetune(FLOAT, METHODS[method], **SHORT, **BLOCKS)
    assert isinstance(case.workload, FinetuneSpec)
    model: Any = build(case, CPU).model
    held = owned_bytes(model.parameters())
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    attention = causal.model.layers[0].self_attn
    names = ("q_proj", "k_proj", "v_proj")
    x = torch.randn(3, attention.q_proj.in_features, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = [getattr(attention, name)(x) for name in names]
        tune(model, case.workload, Pointwise(compiled=False))
        after = [getattr(attention, name)(x) for name in names]
    assert all(torch.equal(left, right) for left, right in zip(before, after, strict=True))
    assert owned_bytes(model.parameters()) == held
    weights = [projection_of(getattr(attention, name)).weight for name in names]
    storages = {each.untyped_storage().data_ptr() for each in weights if each is not None}
    assert len(storages) == {"lora": 1, "qlora": 0, "full": 3}[method]
    model(input_ids=torch.arange(64).view(2, 32), labels=torch.arange(64).view(2, 32)).loss.backward()
    whole = method != "full"
    halves = causal.forward.halves
    assert (causal.forward.run.called["rotate_and_join"] == len(halves) // 2) is whole
