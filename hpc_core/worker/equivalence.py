"""Does the fast path compute what the plain one does? Logits, loss and greedy tokens against the reference path.

Runs last and turns the model itself into the reference: nothing can be measured after it.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch

from hpc_core.bounds.reading import bytes_text
from hpc_core.builders.causal_lm import torch_dtype
from hpc_core.engines.tuned.forward import restore
from hpc_core.record.record import Fact
from hpc_core.worker.decode_engine import compare_with_stock
from hpc_core.worker.metrics import ratio, reported
from hpc_core.worker.reference import (
    full_float32,
    reference_bytes,
    room_bytes,
    turn_into_reference,
)
from hpc_core.worker.session import Session

__all__ = ["MOST_ROWS", "MOST_TOKENS", "TOLERANCES", "Given", "coarsest", "measure_equivalence", "tolerance"]

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


def coarsest(session: Session) -> str:
    """The coarsest arithmetic on the way: a key of `TOLERANCES`."""
    case = session.case
    assert case.model is not None
    formats: set[str] = {case.model.dtype}
    if case.quantization is not None:
        formats.add("int8" if case.quantization.kind == "int8" else case.quantization.compute_dtype)
    if getattr(case.workload, "precision", "pure") == "autocast-bf16":
        formats.add("bfloat16")
    return max(formats, key=TOLERANCES.__getitem__)


def tolerance(session: Session) -> float:
    """The tolerance of this case by the table: that of its coarsest arithmetic."""
    return TOLERANCES[coarsest(session)]


def measure_equivalence(
    session: Session, model: torch.nn.Module, given: Given, *, engine: torch.Tensor | None = None
) -> None:
    """`logits_error` and the fact `equivalence`; of a training batch the loss, of answers the greedy tokens, by both paths.

    `engine` are the logits (rows, answers, vocabulary) that an engine other than the model's own forward chose the answers by: they are
    held against the reference in the forward's place, and against the forward itself (`logits_error_to_stock`, `stock_agreement`). On a GPU only where the float32 reference fits; a note says by how much it does not.
    """
    if not session.options.audit or any(not fact.holds for fact in session.audit.values()):
        return  # what did not run as asked is INVALID already, and may not run as a reference at all
    session.note_process_memory()  # the reference's memory is not the case's
    session.phase("equivalence")
    if session.on_gpu and not _fits(session, model, given):
        return
    try:
        both = _both(session, model, given)
    except torch.OutOfMemoryError as full:
        session.notes.append(f"equivalence: the float32 reference was to fit and did not, nothing is compared: {full}")
        return
    if both is None:
        session.notes.append("equivalence: not checked, the model gives no whole logits, as with a fused loss")
        return
    seen, reference = both
    kept = torch.ones_like(given.ids, dtype=torch.bool) if given.mask is None else given.mask.bool()
    if engine is not None:
        assert given.answers is not None
        places = given.answers.shape[1]
        compare_with_stock(session, engine, seen.logits[:, -places:], given.answers)
        kept = kept.clone()
        kept[:, :-places] = False  # of the prompt an engine gives the last logits alone
        seen = _Outcome(torch.cat([seen.logits[:, :-places], engine], dim=1), None)
    wanted = reference.logits[kept]
    error = _error(seen.logits[kept], wanted)
    allowed = tolerance(session)
    if allowed < error <= _MOST * allowed:
        allowed = _by_the_plain_path(session, model, given, wanted, kept, allowed)
    _compare_logits(session, error, allowed)
    if seen.loss is not None and reference.loss is not None:
        _compare_losses(session, seen.loss, reference.loss, allowed)
    if given.answers is not None and getattr(session.case.workload, "temperature", None) is None:
        _compare_tokens(session, reference.logits[:, -given.answers.shape[1] :], given.answers, allowed)


def _fits(session: Session, model: torch.nn.Module, given: Given) -> bool:
    needed, room = reference_bytes(model, *given.ids.shape), room_bytes(session.device)
    if needed > room:
        session.notes.append(
            f"equivalence: not checked, the float32 reference needs {bytes_text(needed)} more and {bytes_text(room)} are left"
        )
    return needed <= room


def _both(session: Session, model: torch.nn.Module, given: Given) -> tuple[_Outcome, _Outcome] | None:
    """The case's own path, then the reference; without dropout in either. None where a path gives no logits."""
    model.eval()
    autocast = getattr(session.case.workload, "precision", "pure") == "autocast-bf16"
    own = torch.autocast(session.device.type, torch.bfloat16) if autocast else contextlib.nullcontext()
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
    session: Session, model: Any, given: Given, reference: torch.Tensor, kept: torch.Tensor, allowed: float
) -> float:
    """What is allowed where the table is not enough: by what eager attention on unquantized layers errs in the same arithmetic."""
    arithmetic = coarsest(session)
    if arithmetic not in ("float16", "bfloat16"):
        return allowed  # float32 is the reference, and int8 has no plain path
    for parameter in model.parameters():  # buffers stay: rotary frequencies are in float32 in the case too
        parameter.data = parameter.data.to(torch_dtype(arithmetic))
    plain = _forward(model, given)
    if plain is None:
        return allowed
    error = _error(plain.logits[kept], reference)
    if not math.isfinite(error):
        return allowed
    session.notes.append(f"equivalence: the plain path errs by {error:.3g} in {arithmetic}; twice that is allowed")
    return min(max(allowed, _PLAIN_TIMES * error), _MOST * allowed)


def _compare_logits(session: Session, error: float, allowed: float) -> None:
    if math.isfinite(error):
        note = f"relative to float32, dequantized, eager; allowed {allowed:.3g}"
        session.metrics["logits_error"] = reported(error, "ratio", note=note)
    within = f"within {allowed:.3g} of the reference"
    session.audit["equivalence"] = Fact(asked=within, seen=within if error <= allowed else f"off by {error:.3g}")


def _compare_losses(session: Session, seen: float, reference: float, allowed: float) -> None:
    """A loss errs by less than its logits do: it averages over tokens, and a shift of all logits leaves it as it is."""
    if not math.isfinite(reference):
        session.notes.append(f"equivalence: the reference's loss is {reference}, so the losses are not compared")
        return
    error = abs(seen - reference) / abs(reference) if reference else abs(seen)
    for name, value in (("loss_checked", seen), ("loss_reference", reference)):
        if math.isfinite(value):
            session.metrics[name] = reported(value, "nats", note="one batch, without dropout, after the last step")
    within = f"within {allowed:.3g} of the reference"
    session.audit["reference_loss"] = Fact(
        asked=within, seen=within if error <= allowed else f"{seen:.6g}, the reference's is {reference:.6g}"
    )


def _compare_tokens(session: Session, reference: torch.Tensor, answers: torch.Tensor, allowed: float) -> None:
    """Whether the reference, asked at each answered position, would have chosen the same token.

    Where it prefers another one by less than two logits may err, it is a tie and proves nothing. A token from a broken path lies
    some root mean squares of the row below the best one.
    """
    best, chosen = reference.max(dim=-1), reference.gather(-1, answers.unsqueeze(-1)).squeeze(-1)
    same = best.indices == answers
    tied = best.values - chosen <= _TIE * allowed * reference.square().mean(dim=-1).sqrt()
    session.metrics["greedy_agreement"] = ratio(
        float(same.float().mean()), note=f"of {answers.numel()} tokens; the others are ties within the tolerance"
    )
    wrong = (~same & ~tied).nonzero().tolist()
    asked, seen = "the reference's, or tied", f"{len(wrong)} of {answers.numel()} are not the reference's"
    if wrong:
        row, at = wrong[0]
        seen += (
            f"; first token {at} of row {row}: {int(answers[row, at])}, the reference's {int(best.indices[row, at])}"
        )
    session.audit["greedy_tokens"] = Fact(asked=asked, seen=seen if wrong else asked)
