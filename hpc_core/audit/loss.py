"""The facts `loss` and `loss_scale`: the loss is the mean over the labels, and the backward pass starts from that mean.

Both are recomputed from the logits of one training step: the loss from logits and labels, and its gradient at a few positions
as (softmax - one-hot) / labels. Later losses would not show a wrong scale: Adam divides by the size of the gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from hpc_core.builders.data.batching import IGNORED_LABEL
from hpc_core.record.findings import Findings, checked
from hpc_core.record.record import Fact

_WITHIN = 0.01
"""Relative. A gradient of 1 / labels in bfloat16 has a rounding error of up to 0.4 %, the same at every position."""
_POSITIONS = 16
"""Positions at which the gradient is checked, spread over the batch."""
_ROWS = 256
"""Positions whose logits are float32 at the same time: 131 MB for a vocabulary of 128 thousand."""

Uncounted = Callable[[], contextlib.AbstractContextManager[None]]
"""Opens a block inside a counted pass that no counter sees."""


@dataclass
class LossCheck:
    """The loss of one step, recomputed from its logits."""

    labels: int = 0
    """Positions that have a next token to predict."""
    mean: float | None = None
    """Cross-entropy of the logits, averaged over those positions; None if the model returned no logits."""
    scale: float | None = None
    """Gradient at the logits relative to that of the mean, by projection; None if no gradient arrived."""
    _gradients: list[torch.Tensor] = field(default_factory=list)

    def close(self) -> None:
        """Compute `scale` from the gradients that the backward pass stored on the device."""
        if self._gradients:
            actual, expected = self._gradients
            self.scale = float((actual * expected).sum() / expected.square().sum())
            self._gradients.clear()


@contextlib.contextmanager
def watch_loss(
    model: torch.nn.Module,
    labels: torch.Tensor,
    uncounted: Uncounted = contextlib.nullcontext,
) -> Iterator[LossCheck]:
    """Check the loss of one training step in the block, from the first call of `model`; labels are (batch, width).

    The check runs inside `uncounted` blocks and is complete after `LossCheck.close`.
    """
    check = LossCheck()

    def after_forward(_: Any, __: Any, output: Any) -> None:
        logits, head = getattr(output, "logits", None), None
        if logits is None and getattr(output, "hidden_states", None):
            # A fused loss makes no logits: compute them from the last hidden states, a few positions at a time.
            logits, head = output.hidden_states[-1], model.get_output_embeddings().weight  # type: ignore[operator]
        if check.mean is None and isinstance(logits, torch.Tensor) and logits.requires_grad:
            with uncounted(), torch.no_grad():
                store = _check_mean(check, logits, labels, head)
            if store is not None:
                logits.register_hook(lambda gradient: _run_uncounted(store, gradient, uncounted))

    handle = model.register_forward_hook(after_forward)
    try:
        yield check
    finally:
        handle.remove()


def _run_uncounted(store: Callable[[torch.Tensor], None], gradient: torch.Tensor, uncounted: Uncounted) -> None:
    with uncounted(), torch.no_grad():
        store(gradient)


def _check_mean(
    check: LossCheck, logits: torch.Tensor, labels: torch.Tensor, head: torch.Tensor | None
) -> Callable[[torch.Tensor], None] | None:
    """Compute the mean over the labels; return a hook that stores the logits' gradient, or None without labels.

    With a `head`, (vocabulary, features), `logits` are the hidden states before it.
    """

    def apply_head(values: torch.Tensor) -> torch.Tensor:
        return (values if head is None else values @ head.t()).float()

    virtual = logits.shape[1] - labels.shape[1]  # prompt tuning puts positions before the rows, which have no label
    labels = torch.nn.functional.pad(labels, (virtual, 0), value=IGNORED_LABEL)
    next_tokens = labels[:, 1:]  # each position predicts the token after it
    rows, positions = torch.nonzero(next_tokens != IGNORED_LABEL, as_tuple=True)
    check.labels = len(rows)
    if not check.labels:
        return None
    targets = next_tokens[rows, positions]
    sums = []
    for start in range(0, check.labels, _ROWS):
        part = slice(start, start + _ROWS)
        # log_softmax, not logsumexp: the loss has loaded its kernel already; loading another one takes 80 ms.
        log_probabilities = apply_head(logits[rows[part], positions[part]]).log_softmax(dim=1)
        sums.append(log_probabilities.gather(1, targets[part].unsqueeze(1)).double().sum())
    check.mean = -float(torch.stack(sums).sum()) / check.labels
    some = torch.linspace(0, check.labels - 1, min(_POSITIONS, check.labels), device=logits.device).round().long()
    rows, positions, targets = rows[some], positions[some], targets[some]
    expected = apply_head(logits[rows, positions]).softmax(dim=1)
    expected[torch.arange(len(some), device=logits.device), targets] -= 1
    expected /= check.labels
    if head is not None:
        expected = expected @ head.float()

    def store(gradient: torch.Tensor) -> None:
        check._gradients[:] = [gradient[rows, positions].float(), expected]

    return store


def loss_facts(loss: torch.Tensor | None, check: LossCheck) -> Findings:
    """Return whether the step's `loss` is the mean over the labels, and whether its gradient is that mean's, within 1 %.

    A loss that is not finite is reported by a fact of its own.
    """
    reported = float("nan") if loss is None else float(loss)
    if loss is None or not torch.isfinite(loss):
        return Findings()

    def mean() -> Fact:
        if check.mean is None:
            raise LookupError("the model gave no logits with its loss")
        asked = f"mean over {check.labels} labels"
        right = abs(reported - check.mean) <= _WITHIN * abs(check.mean)
        return Fact(asked=asked, seen=asked if right else f"{reported:.4g}, by the logits {check.mean:.4g}")

    def scale() -> Fact:
        if check.scale is None:
            raise LookupError("no gradient was seen at the logits")
        return Fact(asked="1", seen="1" if abs(check.scale - 1) <= _WITHIN else f"{check.scale:.4g}")

    return checked({"loss": mean, "loss_scale": scale})
