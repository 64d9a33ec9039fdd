"""Does the fast path compute what the plain one does? Logits, loss and greedy tokens against the reference path.

The reference is the model itself, turned layer by layer into the same weights dequantized, in float32, with eager attention.
So it runs last: nothing can be measured after it.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from hpc_core.builders.causal_lm import torch_dtype
from hpc_core.builders.quantization import dequantized_weight, packed_layers, quantized_layers
from hpc_core.case.case import Case
from hpc_core.instruments.owners import owned_bytes, weight_tensors
from hpc_core.record.findings import Findings
from hpc_core.record.metrics import metric
from hpc_core.record.record import Fact
from hpc_core.record.units import quantity

TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2, "int8": 2e-1}
"""Largest relative error of the logits, |seen - reference| / |reference|, by the coarsest arithmetic on the way.

A rounding to a format with p bits of mantissa errs by up to 2^-(p+1): 6e-8 in float32, 5e-4 in float16, 4e-3 in bfloat16. Through
tens of layers such errors add up like a random walk, by some ten times; a wrong kernel or mask errs by the order of 1. LLM.int8
rounds activations to eight bits, 4e-3 of their largest, which is far more of a typical one.

Deeper and wider models err more (bfloat16 on an H100: 0.026 in 16 layers of 2048, 0.044 in 28 of 3072, 0.063 in 32 of 4096, 0.095 in 40 of
5120). Where the error is beyond the table, the plain path is run in the case's own arithmetic too, and the fast one may err twice
as much as it, which is how FlashAttention's tests judge; never more than `_MOST` times the table.
"""

_PLAIN_TIMES = 2
_MOST = 4

MOST_ROWS, MOST_TOKENS = 2, 256
"""Of a batch only so much goes through both paths: about a second at three billion parameters, and a wrong kernel shows in it."""

_TIE = 4
"""An error of the tolerance times a row's norm is one of the tolerance times its root mean square in the typical logit; the
difference of two such errors stays below four times that but once in some two hundred."""


@dataclass(frozen=True)
class Given:
    """What both paths are given, as tensors of (rows, width) on the device."""

    ids: torch.Tensor
    mask: torch.Tensor | None
    labels: torch.Tensor | None = None
    """Of a training batch: both paths compute its loss."""
    answers: torch.Tensor | None = None
    """(rows, tokens) generated greedily; the last `tokens` positions of `ids` are where each of them was chosen."""


@dataclass(frozen=True)
class _Outcome:
    logits: torch.Tensor
    loss: float | None


def coarsest(case: Case) -> str:
    """Return the coarsest arithmetic on the way: a key of `TOLERANCES`."""
    assert case.model is not None
    formats: set[str] = {case.model.dtype}
    if case.quantization is not None:
        formats.add("int8" if case.quantization.kind == "int8" else case.quantization.compute_dtype)
    if _autocasts(case):
        formats.add("bfloat16")
    return max(formats, key=TOLERANCES.__getitem__)


def compare_with_reference(
    case: Case,
    model: torch.nn.Module,
    given: Given,
    *,
    restore: Callable[[torch.nn.Module], None],
    engine: torch.Tensor | None = None,
) -> Findings:
    """Return `logits_error` and the fact `equivalence`; of a training batch the loss, of answers the greedy tokens, by both paths.

    On a GPU only where the float32 reference fits; a note says by how much it does not.

    Args:
        case: what was asked for.
        model: is turned into the reference.
        given: what both paths compute.
        restore: puts the libraries' own forwards back into the model.
        engine: logits (rows, answers, vocabulary) that an engine other than the model's own forward chose the answers by. They
            are compared with the reference in the forward's place, and with the forward itself (`logits_error_to_stock`,
            `stock_agreement`).
    """
    room = room_bytes(given.ids.device)
    if room is not None and (needed := reference_bytes(model, *given.ids.shape)) > room:
        why = f"the float32 reference needs {quantity(needed, 'bytes')} more and {quantity(room, 'bytes')} are left"
        return _unchecked(f"not checked, {why}")
    try:
        both = _both(case, model, given, restore)
    except torch.OutOfMemoryError as full:
        return _unchecked(f"the float32 reference was to fit and did not, nothing is compared: {full}")
    if both is None:
        return _unchecked("not checked, the model gives no whole logits, as with a fused loss")
    seen, reference = both
    found = Findings()
    used = torch.ones_like(given.ids, dtype=torch.bool) if given.mask is None else given.mask.bool()
    if engine is not None:
        assert given.answers is not None
        places = given.answers.shape[1]
        found |= _compare_with_stock(case, engine, seen.logits[:, -places:], given.answers)
        used = used.clone()
        used[:, :-places] = False  # of the prompt an engine gives the last logits alone
        seen = _Outcome(torch.cat([seen.logits[:, :-places], engine], dim=1), None)
    wanted = reference.logits[used]
    error = _error(seen.logits[used], wanted)
    allowed = TOLERANCES[coarsest(case)]
    if allowed < error <= _MOST * allowed:
        allowed, notes = _by_the_plain_path(coarsest(case), model, given, wanted, used, allowed)
        found |= notes
    found |= _compare_logits(error, allowed)
    if seen.loss is not None and reference.loss is not None:
        found |= _compare_losses(seen.loss, reference.loss, allowed)
    if given.answers is not None and _is_greedy(case):
        found |= _compare_tokens(reference.logits[:, -given.answers.shape[1] :], given.answers, allowed)
    return found


def _unchecked(why: str) -> Findings:
    return Findings(notes=(f"equivalence: {why}",))


def _autocasts(case: Case) -> bool:
    return getattr(case.workload, "precision", "pure") == "autocast-bf16"


def _is_greedy(case: Case) -> bool:
    return getattr(case.workload, "temperature", None) is None


def _both(
    case: Case, model: torch.nn.Module, given: Given, restore: Callable[[torch.nn.Module], None]
) -> tuple[_Outcome, _Outcome] | None:
    """The case's own path, then the reference; without dropout in either. None where a path gives no logits."""
    model.eval()
    device = given.ids.device.type
    own = torch.autocast(device, torch.bfloat16) if _autocasts(case) else contextlib.nullcontext()
    with own:
        seen = _forward(model, given)
    if seen is None:
        return None
    restore(model)  # the reference's forward is the libraries' own
    turn_into_reference(model)
    with full_float32():
        reference = _forward(model, given)
    return None if reference is None else (seen, reference)


def _forward(model: Any, given: Given) -> _Outcome | None:
    where: dict[str, torch.Tensor] = {}
    if given.answers is not None and given.mask is not None:
        # As `generate` counts them: padding stands on the left and has no position.
        where["position_ids"] = (given.mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        out = model(input_ids=given.ids, attention_mask=given.mask, labels=given.labels, use_cache=False, **where)
    if out.logits is None:
        return None
    return _Outcome(out.logits.float(), None if given.labels is None else float(out.loss))


def _error(seen: torch.Tensor, reference: torch.Tensor) -> float:
    return float((seen - reference).norm() / reference.norm())


def _by_the_plain_path(
    arithmetic: str, model: Any, given: Given, reference: torch.Tensor, used: torch.Tensor, allowed: float
) -> tuple[float, Findings]:
    """What is allowed where the table is not enough: by what eager attention on unquantized layers errs in the same arithmetic."""
    if arithmetic not in ("float16", "bfloat16"):
        return allowed, Findings()  # float32 is the reference, and int8 has no plain path
    for parameter in model.parameters():  # buffers stay: rotary frequencies are in float32 in the case too
        parameter.data = parameter.data.to(torch_dtype(arithmetic))
    plain = _forward(model, given)
    if plain is None:
        return allowed, Findings()
    error = _error(plain.logits[used], reference)
    if not math.isfinite(error):
        return allowed, Findings()
    note = f"equivalence: the plain path errs by {error:.3g} in {arithmetic}; twice that is allowed"
    return min(max(allowed, _PLAIN_TIMES * error), _MOST * allowed), Findings(notes=(note,))


def _compare_with_stock(case: Case, engine: torch.Tensor, stock: torch.Tensor, answers: torch.Tensor) -> Findings:
    """Compare the engine's logits and answers with those of the model's own forward in the case's own precision.

    Both err; neither is right because it is stock. What decides is the float32 reference; these two numbers are shown.
    """
    error = float((engine - stock).norm() / stock.norm())
    note = "relative to the stock forward, same precision"
    metrics = {"logits_error_to_stock": metric("logits_error_to_stock", error, note=note)}
    if _is_greedy(case):
        same = float((stock.argmax(-1) == answers).float().mean())
        note = f"of {answers.numel()} tokens that the stock forward would choose too"
        metrics["stock_agreement"] = metric("stock_agreement", same, note=note)
    return Findings(metrics=metrics)


def _compare_logits(error: float, allowed: float) -> Findings:
    metrics = {}
    if math.isfinite(error):
        note = f"relative to float32, dequantized, eager; allowed {allowed:.3g}"
        metrics["logits_error"] = metric("logits_error", error, note=note)
    within = f"within {allowed:.3g} of the reference"
    fact = Fact(asked=within, seen=within if error <= allowed else f"off by {error:.3g}")
    return Findings(metrics=metrics, facts={"equivalence": fact})


def _compare_losses(seen: float, reference: float, allowed: float) -> Findings:
    """A loss errs by less than its logits do: it averages over tokens, and a shift of all logits leaves it as it is."""
    if not math.isfinite(reference):
        return _unchecked(f"the reference's loss is {reference}, so the losses are not compared")
    error = abs(seen - reference) / abs(reference) if reference else abs(seen)
    note = "one batch, without dropout, after the last step"
    losses = {"loss_checked": seen, "loss_reference": reference}
    within = f"within {allowed:.3g} of the reference"
    differs = f"{seen:.6g}, the reference's is {reference:.6g}"
    return Findings(
        metrics={name: metric(name, loss, note=note) for name, loss in losses.items() if math.isfinite(loss)},
        facts={"reference_loss": Fact(asked=within, seen=within if error <= allowed else differs)},
    )


def _compare_tokens(reference: torch.Tensor, answers: torch.Tensor, allowed: float) -> Findings:
    """Return whether the reference, asked at each answered position, would have chosen the same token.

    Where it prefers another one by less than two logits may err, it is a tie and proves nothing. A token from a broken path lies
    some root mean squares of the row below the best one.
    """
    best, chosen = reference.max(dim=-1), reference.gather(-1, answers.unsqueeze(-1)).squeeze(-1)
    same = best.indices == answers
    tied = best.values - chosen <= _TIE * allowed * reference.square().mean(dim=-1).sqrt()
    note = f"of {answers.numel()} tokens; the others are ties within the tolerance"
    agreement = metric("greedy_agreement", float(same.float().mean()), note=note)
    wrong = (~same & ~tied).nonzero().tolist()
    asked, seen = "the reference's, or tied", f"{len(wrong)} of {answers.numel()} are not the reference's"
    if wrong:
        row, at = wrong[0]
        seen += (
            f"; first token {at} of row {row}: {int(answers[row, at])}, the reference's {int(best.indices[row, at])}"
        )
    fact = Fact(asked=asked, seen=seen if wrong else asked)
    return Findings(metrics={"greedy_agreement": agreement}, facts={"greedy_tokens": fact})


_FLOAT32 = 4
_LOGITS_HELD = 5
"""Float32 copies of the checked logits at once: both paths', both without padding, and their difference."""
_SCORES_HELD = 3
"""Copies of one layer's attention scores that eager attention holds at once: scores, masked, softmax."""


def turn_into_reference(model: Any) -> None:
    """Dequantize every quantized layer, cast everything to float32, and take eager attention. One layer at a time."""
    layers = _quantized(model)
    for name in list(layers):
        # Popped, so that the quantized layer is gone before the next one is converted.
        model.set_submodule(name, _dequantized(layers.pop(name)))
    for parameter in (*model.parameters(), *model.buffers()):
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    model.config._attn_implementation = "eager"  # the switch that each attention reads at every call


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Products of float32 in float32: tfloat32, should the code under test have allowed it, would err like bfloat16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def reference_bytes(model: Any, rows: int, width: int) -> int:
    """What the reference of `model` takes beyond what the model holds now, over (rows, width) ids.

    Four bytes a parameter in place of what it takes now, the largest one twice while it is converted; logits; one layer's
    attention scores and hidden states.
    """
    grown, largest = 0, 0
    layers = _quantized(model)
    inside = {id(tensor) for layer in layers.values() for tensor in (*layer.parameters(), *layer.buffers())}
    for layer in layers.values():
        numbers = int(layer.in_features) * int(layer.out_features)
        grown += _FLOAT32 * numbers - owned_bytes(weight_tensors(layer)["weights"])
        largest = max(largest, numbers)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and id(tensor) not in inside:
            grown += (_FLOAT32 - tensor.element_size()) * tensor.numel()
            largest = max(largest, tensor.numel())
    config = model.config.get_text_config()
    hidden = int(config.hidden_size)
    inner = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    logits = _LOGITS_HELD * rows * width * int(config.vocab_size)
    scores = _SCORES_HELD * rows * int(config.num_attention_heads) * width**2
    states = rows * width * (4 * inner + 8 * hidden)
    return grown + _FLOAT32 * (largest + logits + scores + states)


def room_bytes(device: torch.device) -> int | None:
    """Return what the card still has: free for anyone, or reserved by this process and not in use. None on a CPU."""
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.empty_cache()  # reserved memory in pieces too small for a float32 layer goes back first
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _quantized(model: Any) -> dict[str, Any]:
    if getattr(model, "is_quantized", False) or _has_quantized(model):
        return dict(quantized_layers(model))
    return {}  # without importing bitsandbytes


def _has_quantized(model: torch.nn.Module) -> bool:
    if packed_layers(model):
        return True
    return any(
        "Linear4bit" in type(module).__name__ or "Linear8bitLt" in type(module).__name__ for module in model.modules()
    )


def _dequantized(layer: Any) -> torch.nn.Linear:
    plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    plain.weight = torch.nn.Parameter(dequantized_weight(layer).float(), requires_grad=False)
    if layer.bias is not None:
        plain.bias = torch.nn.Parameter(layer.bias.data.float(), requires_grad=False)
    return plain
