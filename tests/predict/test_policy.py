"""Values that a prediction follows: what is known of masks, counts and random numbers, and what is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hpc_core.predict.policy import ValuePolicy


class _Following(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Shows each operator to a policy, as the watch does."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.policy = ValuePolicy()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs, outputs = (
            [each for each in tree_leaves(tree) if isinstance(each, torch.Tensor)] for tree in ((args, kwargs), out)
        )
        self.policy.follow(func, args, kwargs or {}, inputs, outputs)
        return out


def _known(make: Callable[[], list[torch.Tensor]]) -> list[Any]:
    """What is known of the tensors that this function makes; None for unknown ones."""
    with FakeTensorMode(allow_non_fake_inputs=True), _Following() as following:
        made = make()
        found = [following.policy.of(tensor) for tensor in made]
    return [None if values is None else values.tolist() for values in found]


def test_a_mask_widened_by_zeros_is_full_in_its_prompt_only() -> None:
    """The prompt's part of a static cache's mask is full, so prefill needs no mask; the whole mask is not full."""

    def widened() -> list[torch.Tensor]:
        mask = torch.ones(1, 4, dtype=torch.long).to(torch.bool)
        whole = torch.nn.functional.pad(mask, (0, 3))
        return [part.all() for part in (whole[:, :4], ~whole[:, 4:], whole, mask)]

    assert _known(widened) == [True, True, False, True]


def test_a_view_shares_what_is_known_of_its_base() -> None:
    """A change in place through a view changes the base, and an unknown one makes the base unknown."""

    def changed() -> list[torch.Tensor]:
        ids = torch.tensor([[1, 2], [3, 4]])
        ids[0] += 10
        lost = torch.tensor([1, 2])
        lost[:1] = torch.randn(2, 2).sum() > 0
        return [ids, lost, ids.T]

    assert _known(changed) == [[[11, 12], [3, 4]], None, [[11, 3], [12, 4]]]


def test_weights_and_what_depends_on_them_are_unknown() -> None:
    """Random numbers are weights, unless there is one alone, so activations are unknown whatever their size."""

    def unknown() -> list[torch.Tensor]:
        weight = torch.randn(2, 2)
        return [weight, weight.sum(), (weight > 0).any(), torch.empty(3, dtype=torch.long)]

    assert _known(unknown) == [None] * 4


def test_unknown_numbers_are_finite() -> None:
    """Whether a weight is infinite or not a number is known, and `and` with false is false."""

    def finite() -> list[torch.Tensor]:
        weight = torch.randn(2, 2)
        positive = (weight > 0).any()
        no = torch.zeros((), dtype=torch.bool)
        return [weight.isinf().any(), weight.isnan().any(), weight.isfinite().all(), positive & no, positive | ~no]

    assert _known(finite) == [False, False, True, False, True]


def test_a_random_number_of_the_host_is_known() -> None:
    """One random number decides as it would on a GPU, and repeats after the same seed."""

    def drawn() -> list[torch.Tensor]:
        torch.manual_seed(3)
        first = torch.rand(1)
        torch.manual_seed(3)
        return [first, torch.rand(1), torch.rand(1) < 2]

    first, second, below = _known(drawn)
    assert first == second
    assert below == [True]
