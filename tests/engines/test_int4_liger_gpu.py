"""torchao's int4 and Liger's kernels on a real GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers.models.llama.modeling_llama as llama

from hpc_core.bounds.footprint import expected_bytes
from hpc_core.builders.assemble import Built, build
from hpc_core.builders.quantization import dequantized_weight, quantized_layers
from hpc_core.case.case import Case
from hpc_core.case.parts import ModelSpec, QuantSpec
from hpc_core.case.workloads import GenerateSpec
from hpc_core.catalogue import finetune, full, generate, lora
from hpc_core.engines.decode.program import graph_program
from hpc_core.engines.engine import engine_of
from hpc_core.engines.generate import generate_program
from hpc_core.engines.tuned.engine import TunedTraining
from hpc_core.launch.launcher import Launcher
from hpc_core.record.job import Job
from tests.engines.conftest import losses_of, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU to run kernels on"),
]
_SHORT: dict[str, Any] = {"prompts": 1, "prompt_length": 40, "new_tokens": 12}
_MODEL = ModelSpec(shape="llama-3.2-3b", layers=2)
_INT4 = QuantSpec(kind="int4", compute_dtype="bfloat16")


def _int4_case(**workload: Any) -> Case:
    return generate(
        _MODEL, variant="generate-int4-2-layers", quantization=_INT4, timeout_s=180, **{**_SHORT, **workload}
    )


@pytest.fixture(scope="module")
def packed(device: torch.device) -> Built:
    pytest.importorskip("torchao")
    return build(_int4_case(), device)


def test_tile_packed_weights_are_near_what_was_drawn(packed: Built, device: torch.device) -> None:
    """Every linear layer is tile-packed, with an error of about a tenth."""
    plain = build(generate(_MODEL, variant="generate-2-layers", **_SHORT), device).model
    layers: dict[str, Any] = dict(quantized_layers(packed.model))
    assert len(layers) == 14
    for name, layer in layers.items():
        assert type(layer.weight).__name__ == "Int4TilePackedTo4dTensor"
        drawn: Any = plain.get_submodule(name).weight
        error = relative_error(dequantized_weight(layer), drawn)
        assert 0.03 < error < 0.15, (name, error)


@pytest.mark.parametrize("kernels", ["torch", "inductor"])
@pytest.mark.parametrize("batch", [1, 4])
def test_captured_int4_steps_give_the_stock_forwards_logits(packed: Built, kernels: str, batch: int) -> None:
    """Prefill and captured steps give the logits of transformers' forward on the same int4 weights."""
    workload = GenerateSpec(**_SHORT, batch=batch, engine="graph", kernels=kernels)  # type: ignore[arg-type]
    program = graph_program(packed, workload)
    assert program.captured is not None
    assert program.step_of.kernels == kernels
    draw = torch.Generator().manual_seed(1)
    fed = torch.randint(3, packed.vocab_size, (batch, 8), generator=draw).to(program.device)
    engine = program.logits_after(0, fed, batch)
    ids = torch.cat([program.inputs[0]["input_ids"], fed[:, :-1]], dim=1)
    with torch.no_grad():
        model: Any = packed.model
        stock = model(input_ids=ids, use_cache=False).logits[:, -8:].float()
    assert relative_error(engine, stock) < 0.02


@pytest.mark.parametrize("path", ["generate", "graph"])
def test_int4_answers_are_the_best_of_the_stock_forward(packed: Built, path: str) -> None:
    """Each token's logit is near the stock forward's best, path either path.

    Two of 128 thousand random logits are often equal up to bfloat16's rounding, so four times the relative error of the
    logits' own test is allowed; a wrong token lies several root mean squares below.
    """
    engine: dict[str, Any] = {} if path == "generate" else {"engine": "graph", "kernels": "torch"}
    make = generate_program if path == "generate" else graph_program
    program: Any = make(packed, GenerateSpec(**_SHORT, **engine))
    program.step()
    width = program.inputs[0]["input_ids"].shape[1]
    answer = program.output[:, width:]
    assert answer.shape == (1, _SHORT["new_tokens"])
    with torch.no_grad():
        model: Any = packed.model
        logits = model(input_ids=program.output[:, :-1], use_cache=False).logits[:, width - 1 :].float()
    below = logits.amax(-1) - logits.gather(-1, answer.unsqueeze(-1)).squeeze(-1)
    assert float(below.max()) < 4 * 0.02 * float(logits.square().mean().sqrt())


def test_int4_cases_are_sound_in_forked_workers() -> None:
    """int4 cases run in forked workers, although torchao asks for the GPU's capability on import."""
    pytest.importorskip("torchao")
    with Launcher("warm") as launcher:
        for engine in ({}, {"engine": "graph", "kernels": "inductor"}):
            case = _int4_case(**engine)
            record = launcher.run(Job(case=case))
            assert launcher.way == "warm", launcher.notes
            assert record.status == "ok", (record.reasons, record.failure)
            assert record.audit["packing"].seen == ["tile_packed_to_4d"]
            assert record.metrics["weights_bytes"].value == expected_bytes(case)["weights_bytes"]


def _losses(case: Case, device: torch.device, steps: int = 5) -> tuple[list[float], Any]:
    program: Any = engine_of(case).load(case, device, build(case, device))
    return losses_of(program, steps), program


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize(
    "switches", [{}, {"loss": "liger"}, {"loss": "chunked", "graph": True}], ids=["norms", "loss", "graph"]
)
def test_liger_trains_as_the_libraries_do(method: str, switches: dict[str, Any], device: torch.device) -> None:
    """Losses are the libraries' up to bfloat16's rounding, and Llama's module is not patched."""
    pytest.importorskip("liger_kernel")
    method_spec = lora(dropout=0.0, dtype="bfloat16") if method == "lora" else full
    stock = finetune(_MODEL, method_spec, variant="stock-2-layers", batch=2, length=128, steps=2)
    before = (llama.LlamaRMSNorm.forward, llama.LlamaMLP.forward, llama.apply_rotary_pos_emb, llama.LlamaRMSNorm)
    steps = 7 if switches.get("graph") else 5
    expected, _ = _losses(stock, device, steps)
    losses, program = _losses(stock.vary("liger-2-layers", engine="tuned", fusion="liger", **switches), device, steps)
    assert losses == pytest.approx(expected, rel=5e-3)
    assert isinstance(program, TunedTraining)
    assert not program.fallen
    facts = program.facts().facts
    assert facts["engine_fusion"].seen == "liger"
    assert facts["engine_loss"].seen == switches.get("loss", "stock")
    assert facts["engine_graph"].seen == ("on" if switches.get("graph") else "off")
    assert (
        llama.LlamaRMSNorm.forward,
        llama.LlamaMLP.forward,
        llama.apply_rotary_pos_emb,
        llama.LlamaRMSNorm,
    ) == before
    again, _ = _losses(stock, device, 2)
    assert again == pytest.approx(expected[:2], rel=1e-3)
