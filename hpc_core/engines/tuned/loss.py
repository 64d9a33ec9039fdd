"""Head and cross-entropy together, some rows at a time, so that the logits (rows, vocabulary) never exist as a whole.

The forward computes the gradients while it has a chunk's logits; the backward only scales them. A frozen head has none. After
"Cut Your Losses in Large-Vocabulary Language Models" (Wijmans et al., 2024) and Liger's fused linear cross-entropy; in chunks of hundreds of
rows the head's weights, read once a chunk, hide behind the products.
"""

from __future__ import annotations

from typing import Any

import torch

from hpc_core.engines.tuned.pointwise import Pointwise

IGNORED = -100
"""The label that the loss ignores."""


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, chunk: int, run: Pointwise
    ) -> torch.Tensor:
        need_hidden, need_head = ctx.needs_input_grad[:2]
        with torch.no_grad():
            kept = labels != IGNORED
            share = 1.0 / kept.sum().clamp(min=1).to(_wide_dtype(hidden))  # stays on the device: no wait
            weight, targets = kept * share, labels.clamp(min=0)
            loss = torch.zeros((), dtype=share.dtype, device=hidden.device)
            d_hidden = torch.empty_like(hidden) if need_hidden else None
            d_head = torch.zeros_like(head) if need_head else None
            for start in range(0, hidden.shape[0], chunk):
                part = slice(start, start + chunk)
                logits = hidden[part] @ head.t()
                lost, whole = run("row_losses", logits, targets[part], kept[part])
                loss += lost
                if d_hidden is None and d_head is None:
                    continue
                run("logits_into_gradient", logits, whole, targets[part], weight[part])
                if d_hidden is not None:
                    torch.mm(logits, head, out=d_hidden[part])
                if d_head is not None:
                    # Added inside the product, in float32, and rounded to the head's dtype once a chunk: a float32 buffer of
                    # the head's size would be the largest temporary of the step.
                    d_head.addmm_(logits.t(), hidden[part])
        ctx.save_for_backward(d_hidden, d_head)
        return loss * share

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_hidden, d_head = ctx.saved_tensors
        (arrived,) = gradients
        # In place: nothing else holds them, and the head's is 0.8 GB at a vocabulary of 128 thousand.
        scaled = [None if each is None else each.mul_(arrived.to(each.dtype)) for each in (d_hidden, d_head)]
        return (*scaled, None, None, None)


def _wide_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def next_tokens(labels: torch.Tensor) -> torch.Tensor:
    """Return labels (batch, length) shifted so that each place holds the token it predicts; the last place of a row predicts none."""
    moved = torch.full_like(labels, IGNORED)
    moved[:, :-1] = labels[:, 1:]
    return moved


def chunked_cross_entropy(
    hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, *, chunk: int, run: Pointwise
) -> torch.Tensor:
    """Return the mean cross-entropy over the labels that are not -100, a float32 scalar, as transformers' causal loss gives it.

    hidden: (batch, length, features); head: (vocabulary, features); labels: (batch, length), as given to the model, not shifted.
    A batch without any label gives 0, where a plain mean would give NaN. Backward may be taken once.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    loss: torch.Tensor = _ChunkedLoss.apply(rows, head, next_tokens(labels).reshape(-1), chunk, run)
    return loss
