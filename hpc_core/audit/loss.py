"""The facts `loss` and `loss_scale`: whether the loss is the mean over the labels, and whether just that goes backward.

Both are worked out again from the logits of one training step: the loss in closed form from logits and labels, its gradient
by the closed form (softmax - one-hot) / labels at a few places. An optimizer that divides by the gradient's size, as Adam
does, hides a wrong scale from the losses after it.
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
"""Relative. A gradient of 1 / labels, rounded to bfloat16, errs by up to 0.4 %, and by as much at every place."""
_PLACES = 16
"""Places at which the gradient is looked at, spread over the batch."""
_ROWS = 256
"""Places of logits in float32 at a time: 131 MB of a vocabulary of 128 thousand."""


@dataclass
class LossSeen:
    """What the logits of one step say about its loss."""

    labels: int = 0
    """Places that have a next token to predict."""
    mean: float | None = None
    """Cross-entropy of the logits, averaged over those places; None if no logits were seen."""
    scale: float | None = None
    """Gradient that reached the logits over that of the mean, by projection; None if none was seen."""
    _gradients: list[torch.Tensor] = field(default_factory=list)

    def close(self) -> None:
        """Read what the backward pass left on the device."""
        if self._gradients:
            seen, asked = self._gradients
            self.scale = float((seen * asked).sum() / asked.square().sum())
            self._gradients.clear()


@contextlib.contextmanager
def watch_loss(
    model: torch.nn.Module,
    labels: torch.Tensor,
    aside: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> Iterator[LossSeen]:
    """Watch one training step on these labels, (batch, width), in the block; the first call of `model` counts.

    What was seen is worked out inside `aside`, and is whole after `LossSeen.close`.
    """
    seen = LossSeen()

    def left(_: Any, __: Any, output: Any) -> None:
        logits, head = getattr(output, "logits", None), None
        if logits is None and getattr(output, "hidden_states", None):
            # A loss that never makes whole logits: from the last hidden states, some places at a time.
            logits, head = output.hidden_states[-1], model.get_output_embeddings().weight  # type: ignore[operator]
        if seen.mean is None and isinstance(logits, torch.Tensor) and logits.requires_grad:
            with aside(), torch.no_grad():
                arrived = _look(seen, logits, labels, head)
            if arrived is not None:
                logits.register_hook(lambda gradient: _keep(gradient, arrived, aside))

    handle = model.register_forward_hook(left)
    try:
        yield seen
    finally:
        handle.remove()


def _keep(
    gradient: torch.Tensor,
    arrived: Callable[[torch.Tensor], None],
    aside: Callable[[], contextlib.AbstractContextManager[None]],
) -> None:
    with aside(), torch.no_grad():
        arrived(gradient)


def _look(
    seen: LossSeen, logits: torch.Tensor, labels: torch.Tensor, head: torch.Tensor | None
) -> Callable[[torch.Tensor], None] | None:
    """Note the mean over the labels; give what is to be done with the logits' gradient, or None without labels.

    With a `head`, (vocabulary, features), `logits` are hidden states that it is still to be applied to.
    """

    def applied(values: torch.Tensor) -> torch.Tensor:
        return (values if head is None else values @ head.t()).float()

    wanted = labels[:, 1:]  # each place predicts the token after it
    rows, places = torch.nonzero(wanted != IGNORED_LABEL, as_tuple=True)
    seen.labels = len(rows)
    if not seen.labels:
        return None
    targets = wanted[rows, places]
    sums = []
    for start in range(0, seen.labels, _ROWS):
        part = slice(start, start + _ROWS)
        # log_softmax and not logsumexp: the loss itself has loaded its kernel; another one takes 80 ms to load.
        likely = applied(logits[rows[part], places[part]]).log_softmax(dim=1)
        sums.append(likely.gather(1, targets[part].unsqueeze(1)).double().sum())
    seen.mean = -float(torch.stack(sums).sum()) / seen.labels
    some = torch.linspace(0, seen.labels - 1, min(_PLACES, seen.labels), device=logits.device).round().long()
    rows, places, targets = rows[some], places[some], targets[some]
    asked = applied(logits[rows, places]).softmax(dim=1)
    asked[torch.arange(len(some), device=logits.device), targets] -= 1
    asked /= seen.labels
    if head is not None:
        asked = asked @ head.float()

    def arrived(gradient: torch.Tensor) -> None:
        seen._gradients[:] = [gradient[rows, places].float(), asked]

    return arrived


def loss_facts(loss: torch.Tensor | None, seen: LossSeen) -> Findings:
    """Whether `loss`, which the step reports, is the mean over the labels, and whether its gradient is that mean's, within 1 %.

    A loss that is not finite has a fact of its own.
    """
    reported = float("nan") if loss is None else float(loss)
    if loss is None or not torch.isfinite(loss):
        return Findings()

    def mean() -> Fact:
        if seen.mean is None:
            raise LookupError("the model gave no logits with its loss")
        asked = f"mean over {seen.labels} labels"
        right = abs(reported - seen.mean) <= _WITHIN * abs(seen.mean)
        return Fact(asked=asked, seen=asked if right else f"{reported:.4g}, by the logits {seen.mean:.4g}")

    def scale() -> Fact:
        if seen.scale is None:
            raise LookupError("no gradient was seen at the logits")
        return Fact(asked="1", seen="1" if abs(seen.scale - 1) <= _WITHIN else f"{seen.scale:.4g}")

    return checked({"loss": mean, "loss_scale": scale})
