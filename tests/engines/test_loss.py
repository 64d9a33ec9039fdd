"""The chunked loss equals the loss of whole logits, which it never holds."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hpc_core.engines.tuned.loss import chunked_cross_entropy, next_tokens
from hpc_core.engines.tuned.pointwise import Pointwise

PLAIN = Pointwise(compiled=False)


def _drawn(seed: int, rows: int, length: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states (rows, length, 8), head (vocabulary, 8) and labels, some of them ignored."""
    source = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, length, 8, generator=source, dtype=torch.float64)
    head = torch.randn(vocabulary, 8, generator=source, dtype=torch.float64)
    labels = torch.randint(0, vocabulary, (rows, length), generator=source)
    ignored = torch.rand(rows, length, generator=source) < 0.3
    ignored[:, 1] = False
    return hidden, head, labels.masked_fill(ignored, -100)


def _plain(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss of whole logits, shifted and averaged as in transformers."""
    logits = (hidden @ head.t())[:, :-1].reshape(-1, head.shape[0])
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].reshape(-1), ignore_index=-100)


def _chunked_and_whole(
    hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, chunk: int, dtype: torch.dtype
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Loss and both gradients, chunked in `dtype` and whole in float64."""

    def loss_and_gradients(loss_of: Any, kind: torch.dtype) -> list[torch.Tensor]:
        leaves = [each.detach().to(kind).requires_grad_() for each in (hidden, head)]
        loss = loss_of(*leaves, labels)
        torch.autograd.backward(loss * 3.0)  # gradients must include a factor from above
        return [loss.detach(), *(each.grad for each in leaves if each.grad is not None)]

    chunked = functools.partial(chunked_cross_entropy, chunk=chunk, run=PLAIN)
    return loss_and_gradients(chunked, dtype), loss_and_gradients(_plain, torch.float64)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 3), length=st.integers(2, 9), chunk=st.integers(1, 30))
def test_loss_and_gradients_are_those_of_whole_logits(seed: int, rows: int, length: int, chunk: int) -> None:
    """In float64, for any chunk, loss and gradients equal those of whole logits to 1e-12."""
    chunked, whole = _chunked_and_whole(*_drawn(seed, rows, length, 17), chunk, torch.float64)
    for actual, expected in zip(chunked, whole, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_lower_precision_errs_by_its_rounding(dtype: torch.dtype, within: float) -> None:
    """In float32 and bfloat16 gradients err by a few roundings, and the loss is float32."""
    chunked, whole = _chunked_and_whole(*_drawn(1, 2, 33, 50), 8, dtype)
    assert chunked[0].dtype == torch.float32
    for actual, expected in zip(chunked, whole, strict=True):
        assert float((actual.double() - expected).norm() / expected.norm()) < within


def test_labels_move_by_one_and_the_last_place_predicts_nothing() -> None:
    """Each place's label is the next token of its own row; the last place has none."""
    assert next_tokens(torch.tensor([[1, 2, 3], [4, -100, 6]])).tolist() == [[2, 3, -100], [-100, 6, -100]]


def test_a_batch_without_labels_gives_zero_and_no_nan() -> None:
    """If every label is ignored, loss and gradients are zero."""
    hidden, head, labels = _drawn(2, 1, 4, 11)
    hidden.requires_grad_()
    loss = chunked_cross_entropy(hidden, head, torch.full_like(labels, -100), chunk=2, run=PLAIN)
    torch.autograd.backward(loss)
    assert float(loss.detach()) == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()


class _Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The size of the largest tensor that an operator returned, and the number of matrix products."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numbers, self.products = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.products += function.overloadpacket.__name__ in ("mm", "addmm", "addmm_")
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, torch.Tensor):
                self.numbers = max(self.numbers, each.numel())
        return out


@pytest.mark.parametrize(("frozen", "products"), [(True, 2), (False, 3)], ids=["frozen-head", "trained-head"])
def test_logits_are_never_whole_and_a_frozen_head_costs_no_product(frozen: bool, products: int) -> None:
    """No tensor exceeds a chunk's logits; a chunk takes two products, and a third if the head is trained."""
    hidden, head, labels = _drawn(3, 2, 16, 400)
    hidden.requires_grad_()
    head.requires_grad_(not frozen)
    with _Largest() as watched:
        torch.autograd.backward(chunked_cross_entropy(hidden, head, labels, chunk=8, run=PLAIN))
    assert watched.numbers == 8 * 400 < hidden.shape[0] * hidden.shape[1] * 400
    assert watched.products == products * 4
