"""Compare logits, loss and greedy tokens of the case's own path with those of a reference path.

The reference is the model itself, converted layer by layer: the same weights dequantized, in float32, with eager attention.
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
"""Largest relative error of the logits, |actual - reference| / |reference|, by the coarsest arithmetic in the path.

Rounding to a format with p bits of mantissa has an error of up to 2^-(p+1): 6e-8 in float32, 5e-4 in float16, 4e-3 in bfloat16.
Over tens of layers these errors add up like a random walk, to about ten times that; a wrong kernel or mask causes an error of
the order of 1. LLM.int8 rounds activations to eight bits: 4e-3 of the largest one, which is far more for a typical one.

Deeper and wider models have larger errors (bfloat16 on an H100: 0.026 in 16 layers of 2048, 0.044 in 28 of 3072, 0.063 in 32 of
4096, 0.095 in 40 of 5120). If the error exceeds the table, the plain path also runs in the case's arithmetic, and the fast path
may have twice its error, as in FlashAttention's tests, but never more than `_MOST` times the table.
"""

_PLAIN_TIMES = 2
_MOST = 4

MOST_ROWS, MOST_TOKENS = 2, 256
"""Both paths run at most this much of a batch. It takes about a second at three billion parameters, and shows a wrong kernel."""

_TIE = 4
"""Two logits are tied if they differ by less than this many times the tolerance times the row's root mean square, the typical
error of one logit. The difference of two such errors exceeds that about once in two hundred."""


@dataclass(frozen=True)
class Given:
    """The inputs of both paths, as tensors of (rows, width) on the device."""

    ids: torch.Tensor
    mask: torch.Tensor | None
    labels: torch.Tensor | None = None
    """Labels of a training batch: both paths compute its loss."""
    answers: torch.Tensor | None = None
    """(rows, tokens), generated greedily; they were chosen at the last `tokens` positions of `ids`."""


@dataclass(frozen=True)
class _Outcome:
    logits: torch.Tensor
    loss: float | None


def coarsest(case: Case) -> str:
    """Return the coarsest arithmetic in the case's path: a key of `TOLERANCES`."""
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
    """Return `logits_error` and the fact `equivalence`, and compare the loss of a training batch or the greedy tokens of answers.

    If the float32 reference does not fit on the GPU, nothing is compared and a note says how much memory is missing.

    Args:
        case: what was asked for.
        model: the live model; it is converted into the reference.
        given: the inputs of both paths.
        restore: puts the libraries' own forwards back into the model.
        engine: logits (rows, answers, vocabulary) from which an engine other than the model's own forward chose the answers.
            They are compared with the reference instead of the forward's logits, and also with the forward's
            (`logits_error_to_stock`, `stock_agreement`).
    """
    room = room_bytes(given.ids.device)
    if room is not None and (needed := reference_bytes(model, *given.ids.shape)) > room:
        why = f"the float32 reference needs {quantity(needed, 'bytes')} more and {quantity(room, 'bytes')} are left"
        return _unchecked(f"not checked, {why}")
    try:
        both = _both(case, model, given, restore)
    except torch.OutOfMemoryError as full:
        return _unchecked(f"not checked, the float32 reference needed more memory than estimated: {full}")
    if both is None:
        return _unchecked("not checked, the model gives no whole logits, as with a fused loss")
    actual, reference = both
    found = Findings()
    used = torch.ones_like(given.ids, dtype=torch.bool) if given.mask is None else given.mask.bool()
    if engine is not None:
        assert given.answers is not None
        tokens = given.answers.shape[1]
        found |= _compare_with_stock(case, engine, actual.logits[:, -tokens:], given.answers)
        used = used.clone()
        used[:, :-tokens] = False  # an engine returns only the last logits of the prompt
        actual = _Outcome(torch.cat([actual.logits[:, :-tokens], engine], dim=1), None)
    expected = reference.logits[used]
    error = _error(actual.logits[used], expected)
    allowed = TOLERANCES[coarsest(case)]
    if allowed < error <= _MOST * allowed:
        allowed, notes = _allowed_by_plain_path(coarsest(case), model, given, expected, used, allowed)
        found |= notes
    found |= _compare_logits(error, allowed)
    if actual.loss is not None and reference.loss is not None:
        found |= _compare_losses(actual.loss, reference.loss, allowed)
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
    """Run the case's own path, then the reference, both without dropout; return None if either returns no logits."""
    model.eval()
    device = given.ids.device.type
    own = torch.autocast(device, torch.bfloat16) if _autocasts(case) else contextlib.nullcontext()
    with own:
        actual = _forward(model, given)
    if actual is None:
        return None
    restore(model)  # the reference runs the libraries' own forward
    turn_into_reference(model)
    with full_float32():
        reference = _forward(model, given)
    return None if reference is None else (actual, reference)


def _forward(model: Any, given: Given) -> _Outcome | None:
    where: dict[str, torch.Tensor] = {}
    if given.answers is not None and given.mask is not None:
        # As in `generate`: padding is on the left and has no position.
        where["position_ids"] = (given.mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        out = model(input_ids=given.ids, attention_mask=given.mask, labels=given.labels, use_cache=False, **where)
    if out.logits is None:
        return None
    logits = out.logits[:, -given.ids.shape[1] :]  # prompt tuning puts virtual tokens before the rows
    return _Outcome(logits.float(), None if given.labels is None else float(out.loss))


def _error(actual: torch.Tensor, reference: torch.Tensor) -> float:
    return float((actual - reference).norm() / reference.norm())


def _allowed_by_plain_path(
    arithmetic: str, model: Any, given: Given, reference: torch.Tensor, used: torch.Tensor, allowed: float
) -> tuple[float, Findings]:
    """Return the allowed error, from the error of the plain path in the same arithmetic: eager attention, unquantized layers."""
    if arithmetic not in ("float16", "bfloat16"):
        return allowed, Findings()  # float32 is the reference, and int8 has no plain path
    for parameter in model.parameters():  # not buffers: rotary frequencies are float32 in the case too
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
    """Compare the engine's logits and answers with those of the model's own forward in the case's precision.

    Both have rounding errors, so these two numbers are only shown. The float32 reference decides.
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


def _compare_losses(actual: float, reference: float, allowed: float) -> Findings:
    """Compare the two losses within the tolerance of the logits.

    A loss has a smaller error than its logits: it averages over tokens, and does not change when all logits shift.
    """
    if not math.isfinite(reference):
        return _unchecked(f"the reference's loss is {reference}, so the losses are not compared")
    error = abs(actual - reference) / abs(reference) if reference else abs(actual)
    note = "one batch, without dropout, after the last step"
    losses = {"loss_checked": actual, "loss_reference": reference}
    within = f"within {allowed:.3g} of the reference"
    differs = f"{actual:.6g}, the reference's is {reference:.6g}"
    return Findings(
        metrics={name: metric(name, loss, note=note) for name, loss in losses.items() if math.isfinite(loss)},
        facts={"reference_loss": Fact(asked=within, seen=within if error <= allowed else differs)},
    )


def _compare_tokens(reference: torch.Tensor, answers: torch.Tensor, allowed: float) -> Findings:
    """Return whether the reference would have chosen the same token at each answered position.

    If it prefers another token by less than the error of two logits, that is a tie and proves nothing. A token from a broken
    path is several root mean squares of the row below the best one.
    """
    best, chosen = reference.max(dim=-1), reference.gather(-1, answers.unsqueeze(-1)).squeeze(-1)
    same = best.indices == answers
    tied = best.values - chosen <= _TIE * allowed * reference.square().mean(dim=-1).sqrt()
    note = f"of {answers.numel()} tokens; the others are ties within the tolerance"
    agreement = metric("greedy_agreement", float(same.float().mean()), note=note)
    wrong = (~same & ~tied).nonzero().tolist()
    asked, differs = "the reference's, or tied", f"{len(wrong)} of {answers.numel()} are not the reference's"
    if wrong:
        row, at = wrong[0]
        differs += (
            f"; first token {at} of row {row}: {int(answers[row, at])}, the reference's {int(best.indices[row, at])}"
        )
    fact = Fact(asked=asked, seen=differs if wrong else asked)
    return Findings(metrics={"greedy_agreement": agreement}, facts={"greedy_tokens": fact})


_FLOAT32 = 4
_LOGITS_HELD = 5
"""Float32 copies of the checked logits that exist at once: both paths', both without padding, and their difference."""
_SCORES_HELD = 3
"""Copies of one layer's attention scores that exist at once in eager attention: scores, masked, softmax."""


def turn_into_reference(model: Any) -> None:
    """Dequantize every quantized layer, one at a time, cast everything to float32, and select eager attention."""
    layers = _quantized(model)
    for name in list(layers):
        # Popped, so that the quantized layer is freed before the next one is converted.
        model.set_submodule(name, _dequantized(layers.pop(name)))
    for parameter in (*model.parameters(), *model.buffers()):
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    model.config._attn_implementation = "eager"  # the switch that each attention reads at every call


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 products in full precision in the block, even if the code under test has enabled tfloat32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def reference_bytes(model: Any, rows: int, width: int) -> int:
    """Return the bytes that the reference of `model` needs beyond what the model holds now, for (rows, width) ids.

    Four bytes per parameter instead of its current size, the largest parameter once more while it is converted, the logits, and
    one layer's attention scores and hidden states.
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
    scores = _SCORES_HELD * rows * int(getattr(config, "num_attention_heads", 0)) * width**2  # Mamba has none
    states = rows * width * (4 * inner + 8 * hidden)
    return grown + _FLOAT32 * (largest + logits + scores + states)


def room_bytes(device: torch.device) -> int | None:
    """Return the bytes available on the GPU: free, or reserved by this process and not in use. None on a CPU."""
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.empty_cache()  # reserved pieces may be too small for a float32 layer
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
