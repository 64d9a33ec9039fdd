"""int4 weights by torchao: what is refused, what is packed and counted, and the engine that runs on them."""

from __future__ import annotations

import logging
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpc_core.audit.model import int4_bytes
from hpc_core.bounds.footprint import expected_bytes
from hpc_core.builders.assemble import Built, build
from hpc_core.builders.quantization import dequantized_weight, quantized_layers
from hpc_core.case.case import Case, case_from_json, case_to_json
from hpc_core.case.errors import BuildError, MissingLibraryError, SpecError
from hpc_core.case.parts import QuantSpec
from hpc_core.case.workloads import GenerateSpec
from hpc_core.catalogue import INT4, finetune, generate, lora, tiny
from hpc_core.engines.decode.model import PackedLinear, decoder_of, times
from hpc_core.engines.decode.program import graph_program
from hpc_core.engines.generate import generate_program
from hpc_core.instruments.owners import living_tensors, owned_bytes, weight_tensors
from hpc_core.launch import forkserver
from hpc_core.record.job import Job
from hpc_core.record.record import Record
from hpc_core.worker.main import run_job
from tests.predict.predicting import predicted, values

_CPU = torch.device("cpu")
_SHORT: dict[str, Any] = {"prompts": 1, "prompt_length": 20, "new_tokens": 6}


def _int4(group: int = 32) -> QuantSpec:
    return QuantSpec(kind="int4", compute_dtype="bfloat16", group_size=group)


def _case(**changes: Any) -> Case:
    return generate(tiny, variant="generate-int4", quantization=_int4(), **{**_SHORT, **changes})


@pytest.fixture(scope="module")
def built() -> Built:
    pytest.importorskip("torchao", reason="int4 is packed by torchao")
    logging.getLogger("torchao").setLevel(logging.ERROR)  # it lists the CUDA libraries that a CPU cannot load
    return build(_case(), _CPU)


def test_int4_with_unsupported_features_is_refused() -> None:
    """int4 supports no training, no adapter, no Triton kernels and no weights but bfloat16."""
    with pytest.raises(SpecError, match="cannot be fine-tuned"):
        finetune(tiny, lora()).vary("int4", quantization=_int4())
    with pytest.raises(SpecError, match="support no adapter"):
        _case(engine="graph", kernels="torch").vary("adapted", adapter=lora().adapter)
    with pytest.raises(SpecError, match="kernels='inductor' or 'torch'"):
        _case(engine="graph")
    with pytest.raises(SpecError, match="quantizes bfloat16 weights"):
        _case().vary("wide", model_dtype="float32")


def test_a_default_group_size_is_left_out_of_json() -> None:
    """JSON and digest omit the default group size, so older baselines are still found, and include any other."""
    nf4 = generate(tiny, quantization=QuantSpec(kind="nf4", compute_dtype="bfloat16"))
    assert b"group_size" not in case_to_json(nf4)
    assert b'"group_size":32' in case_to_json(_case())
    assert case_from_json(case_to_json(_case())) == _case()
    assert INT4[0].quantization == QuantSpec(kind="int4", compute_dtype="bfloat16")


@given(
    rows=st.integers(1, 64).map(lambda n: 8 * n),
    columns=st.integers(1, 8).map(lambda n: 1024 * n),
    group=st.sampled_from([32, 64, 128, 256]),
)
def test_partial_tiles_are_padded(rows: int, columns: int, group: int) -> None:
    """For whole tiles both packings take half a byte per weight and four bytes per group; any part of a tile takes a whole one."""
    spec = _int4(group)
    assert int4_bytes(spec, columns, rows, "tile_packed_to_4d") == int4_bytes(spec, columns, rows, "opaque")
    assert int4_bytes(spec, columns, rows, "opaque") == rows * columns // 2 + 4 * rows * columns // group
    wider = int4_bytes(spec, columns + group, rows, "tile_packed_to_4d")
    assert wider == int4_bytes(spec, columns + 1024, rows, "tile_packed_to_4d")


def test_packed_layers_are_close_to_the_drawn_weights(built: Built) -> None:
    """Every linear layer but the head is packed; its error is about a tenth, where misplaced weights would err by 1.4."""
    plain: Any = build(generate(tiny, **_SHORT), _CPU).model
    model: Any = built.model
    layers = quantized_layers(model)
    assert len(layers) == 21
    assert type(model.lm_head.weight) is torch.nn.Parameter
    for name, layer in layers.items():
        drawn = plain.get_submodule(name).weight
        error = (dequantized_weight(layer) - drawn).norm() / drawn.norm()
        assert 0.03 < error < 0.15, name


def test_only_the_packed_tensors_count_as_bytes(built: Built) -> None:
    """The wrapper's own empty storage counts neither as a weight nor as a living tensor."""
    owned = weight_tensors(built.model)["weights"]
    assert not any(type(tensor).__name__.startswith("Int4") for tensor in owned + living_tensors(_CPU))
    layers: list[Any] = list(quantized_layers(built.model).values())
    packed = sum(int4_bytes(_int4(), layer.in_features, layer.out_features, "opaque") for layer in layers)
    plain = sum(p.nbytes for p in built.model.parameters() if not type(p).__name__.startswith("Int4"))
    buffers = sum(buffer.nbytes for buffer in built.model.buffers())
    assert owned_bytes(owned) == packed + plain + buffers


def test_the_engines_product_is_the_layers(built: Built) -> None:
    """The engine's layer gives the module's output bit for bit, and shares its tensors."""
    model: Any = built.model
    module = model.model.layers[0].mlp.down_proj
    packed = PackedLinear(module)
    x = torch.randn(2, 3, packed.in_features, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.no_grad():
        assert torch.equal(packed(x), module(x))
        bias = torch.ones(packed.out_features, dtype=torch.bfloat16)
        assert torch.equal(times(x, packed.weight, bias), module(x) + bias)
    assert packed.weight.codes.data_ptr() == module.weight.qdata.data_ptr()


def test_the_engine_answers_as_generate_does(built: Built) -> None:
    """On the same int4 weights the graph engine and `generate` choose the same tokens."""
    assert decoder_of(built.model).int4
    stock = generate_program(built, GenerateSpec(**_SHORT))
    graph = graph_program(built, GenerateSpec(**_SHORT, engine="graph", kernels="torch"))
    stock.step()
    graph.step()
    assert graph.answer_ids() == stock.answer_ids()


@pytest.mark.parametrize(
    "engine", [{}, {"engine": "graph", "kernels": "torch", "head": "int8"}], ids=["stock", "graph"]
)
def test_an_int4_case_is_sound_and_names_its_packing(built: Built, engine: dict[str, Any]) -> None:
    """An int4 case passes the whole audit, and its record names the CPU's packing."""
    record: Record = run_job(Job(case=_case(**engine)), lambda _: None)
    assert record.status == "ok", record.reasons
    assert record.audit["packing"].seen == ["opaque"]
    assert record.audit["group_size"].seen == [32]
    assert record.audit["quantization"].seen == ["int4"]
    assert record.audit["quantized_bytes"].holds
    assert record.audit["weights"].holds
    assert record.metrics["logits_error"].value < 0.05


def test_exchanged_int4_weights_are_found(built: Built) -> None:
    """The fact `weights` fails if two layers exchange their packed weights."""
    from hpc_core.audit.model import value_facts

    model: Any = built.model
    first, second = (layer.mlp for layer in model.model.layers[:2])
    first.up_proj.weight, second.up_proj.weight = second.up_proj.weight, first.up_proj.weight
    try:
        fact = value_facts(_case(), built.model).facts["weights"]
    finally:
        first.up_proj.weight, second.up_proj.weight = second.up_proj.weight, first.up_proj.weight
    assert not fact.holds
    assert "up_proj" in str(fact.seen)


def test_rows_that_do_not_divide_into_groups_are_refused() -> None:
    """A row that is no multiple of the group is refused; torchao would only log it and leave the layer unquantized."""
    pytest.importorskip("torchao", reason="int4 is packed by torchao")
    narrow = generate(tiny, quantization=_int4(256), **_SHORT)
    with pytest.raises(BuildError, match="A CPU has int4 kernels for groups of 32, 64, 128"):
        build(narrow, _CPU)
    odd = QuantSpec(kind="int4", compute_dtype="bfloat16", group_size=128)
    model = torch.nn.Sequential(torch.nn.Linear(192, 32, dtype=torch.bfloat16))
    from hpc_core.builders.quantization import quantize_to_int4

    with pytest.raises(BuildError, match="rows of 192 weights"):
        quantize_to_int4(model, odd, _CPU)


def test_without_torchao_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torchao the error names the extra to install."""
    for name in ("torchao", "torchao.prototype.quantization.int4"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingLibraryError, match=r"hpc-core\[int4\]"):
        build(_case(), _CPU)


def test_a_forkserver_learns_a_gpus_capability_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the forkserver imports torchao, both of torch's ways to ask for the GPU's capability answer without CUDA; then they are restored."""
    pytest.importorskip("torchao", reason="only torchao asks for the capability")
    from torch._dynamo.device_interface import CudaInterface

    original = torch.cuda.get_device_capability, CudaInterface.Worker.get_device_properties
    monkeypatch.setattr(forkserver, "compute_capability", lambda: (9, 0))
    with forkserver.gpus_by_nvml():
        assert torch.cuda.get_device_capability() == (9, 0)
        assert CudaInterface.Worker.get_device_properties().major == 9
    assert (torch.cuda.get_device_capability, CudaInterface.Worker.get_device_properties) == original


@pytest.mark.nightly  # a prediction takes half a minute; the packing itself is checked by the tests above
def test_int4_is_predicted_in_the_packing_of_a_gpu() -> None:
    """A predicted int4 case has the closed form's weights in a GPU's packing; with engine='graph' it is refused."""
    pytest.importorskip("torchao", reason="int4 is packed by torchao")
    short = INT4[0].vary("generate-int4-2-layers", layers=2, new_tokens=4, prompts=1)
    stock, engine = predicted([short, INT4[1]])
    assert values(stock)["weights_bytes"] == expected_bytes(short)["weights_bytes"]
    assert stock.audit["packing"].seen == ["tile_packed_to_4d"]
    assert stock.status == "ok", stock.reasons
    assert engine.failure is not None
    assert "engine='graph'" in engine.failure.message
