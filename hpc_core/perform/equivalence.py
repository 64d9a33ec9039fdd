"""Does the fast path compute what the plain one does? Logits against the same weights dequantized, in float32, with eager attention.

Runs last and turns the model itself into the reference, layer by layer: nothing can be measured after it.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from hpc_core.build.libraries import library
from hpc_core.build.quantization import quantized_layers
from hpc_core.perform.metrics import reported
from hpc_core.perform.session import Session
from hpc_core.record import Fact

__all__ = ["TOLERANCES", "measure_equivalence", "tolerance", "turn_into_reference"]

TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2, "int8": 2e-1}
"""Largest relative error of the logits, |seen - reference| / |reference|, by the coarsest arithmetic on the way.

A rounding to a format with p bits of mantissa errs by up to 2^-(p+1): 6e-8 in float32, 5e-4 in float16, 4e-3 in bfloat16. Through
tens of layers such errors add up like a random walk, by some ten times; a wrong kernel or mask errs by the order of 1. LLM.int8
rounds activations to eight bits, 4e-3 of their largest, which is far more of a typical one.
"""


def tolerance(session: Session) -> float:
    """The tolerance of this case: that of its coarsest arithmetic."""
    case = session.case
    assert case.model is not None
    formats: set[str] = {case.model.dtype}
    if case.quantization is not None:
        formats.add("int8" if case.quantization.kind == "int8" else case.quantization.compute_dtype)
    if getattr(case.workload, "precision", "pure") == "autocast-bf16":
        formats.add("bfloat16")
    return max(TOLERANCES[name] for name in formats)


def measure_equivalence(session: Session, model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor | None) -> None:
    """`logits_error` and the fact `equivalence`, over the given ids, (batch, width), where the mask says they are real.

    On a CPU only: on a GPU the float32 reference would need room that a case does not leave by right.
    """
    broken = any(not fact.holds for fact in session.audit.values())
    if session.on_gpu or broken:  # what did not run as asked is INVALID already, and may not run as a reference at all
        return
    session.phase("equivalence")
    model.eval()
    kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    seen = _logits(model, ids, mask)[kept]
    turn_into_reference(model)
    reference = _logits(model, ids, mask)[kept]
    error = float((seen - reference).norm() / reference.norm())
    allowed = tolerance(session)
    if math.isfinite(error):
        note = f"relative to float32, dequantized, eager; allowed {allowed:g}"
        session.metrics["logits_error"] = reported(error, "ratio", note=note)
    within = f"within {allowed:g} of the reference"
    session.audit["equivalence"] = Fact(asked=within, seen=within if error <= allowed else f"off by {error:.3g}")


def _logits(model: Any, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits.float()


def turn_into_reference(model: Any) -> None:
    """Dequantize every quantized layer, cast everything to float32, and take eager attention."""
    if getattr(model, "is_quantized", False) or _has_quantized(model):
        for name, layer in quantized_layers(model).items():
            model.set_submodule(name, _dequantized(layer))
    for parameter in (*model.parameters(), *model.buffers()):
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    model.config._attn_implementation = "eager"  # the switch that each attention reads at every call


def _has_quantized(model: torch.nn.Module) -> bool:
    return any(
        "Linear4bit" in type(module).__name__ or "Linear8bitLt" in type(module).__name__ for module in model.modules()
    )


def _dequantized(layer: Any) -> torch.nn.Linear:
    bnb = library("bitsandbytes", "The reference of a quantized model")
    if isinstance(layer, bnb.nn.Linear4bit):
        weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    else:
        rows = layer.state.CB if layer.state.CB is not None else layer.weight.CB
        constants = layer.state.SCB if layer.state.SCB is not None else layer.weight.SCB
        weight = rows.float() * constants.float().view(-1, 1) / 127  # rows are scaled so that their largest is 127
    plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    plain.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
    if layer.bias is not None:
        plain.bias = torch.nn.Parameter(layer.bias.data.float(), requires_grad=False)
    return plain
