"""Work is attributed to its module in the forward, in the backward, in recomputation and after an error."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from hpc_core.instruments.allocations import StorageWatch
from hpc_core.instruments.attribution import NamedRanges, ranges_and_work
from hpc_core.instruments.owners import by_module
from hpc_core.instruments.places import following, path_of

pytestmark = pytest.mark.slow


class Block(torch.nn.Module):
    """A layer with work of its own around its part's."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add the sine of a product."""
        return torch.sin(self.up(x)) + x


class Model(torch.nn.Module):
    """Three layers, with checkpointing if `recompute`."""

    def __init__(self, *, recompute: bool = False) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Block() for _ in range(3))
        self.recompute = recompute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the layers."""
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
        return x


def watched(model: Model) -> tuple[StorageWatch, dict[str, int]]:
    with following() as places:
        watch = StorageWatch(("forward", "backward"))
        watch.place = places.here
        with watch:
            watch("forward")
            loss = model(torch.ones(2, 4)).sum()
            watch("backward")
            loss.backward()
        return watch, {path: each.calls for path, each in places.modules().items()}


def test_operators_are_attributed_to_their_modules() -> None:
    """Operators of the layers and of their parts are found under one path for all three layers, forward and backward."""
    watch, calls = watched(Model())

    assert watch.uses["layers.*.up", "forward", "aten.addmm.default"] == 3
    assert watch.uses["layers.*", "forward", "aten.sin.default"] == 3
    assert watch.uses["layers.*", "backward", "aten.cos.default"] == 3
    assert watch.uses["layers.*.up", "backward", "aten.mm.default"] == 5  # the first layer's input takes no gradient
    assert calls == {"Model": 1, "layers.*": 3, "layers.*.up": 3}


def test_recomputed_forwards_are_counted() -> None:
    """A recomputation counts as a forward, and leaves its modules even if it stops early."""
    watch, calls = watched(Model(recompute=True))

    assert (calls["layers.*"], calls["layers.*.up"]) == (6, 6)
    assert watch.uses["layers.*", "backward", "aten.cos.default"] == 3


def test_a_forward_that_raises_leaves_its_modules() -> None:
    """After an error no module is current."""
    with following() as places:
        with pytest.raises(RuntimeError):
            Model()(torch.ones(2, 3))
        assert places.here() == ""


def test_parameters_gradients_and_state_have_an_owner() -> None:
    """Weights, gradients and optimizer state are found under their module."""
    model = Model()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()

    tensors_by_path = [(path, len(tensors)) for path, tensors in by_module(model, optimizer)]

    assert {path for path, _ in tensors_by_path} == {"layers.*.up"}
    # Each of six parameters has a gradient, a step count and two moments.
    assert sum(count for _, count in tensors_by_path) == 6 * 2 + 6 * 3


def test_parameters_in_one_storage_belong_to_the_module_around_them() -> None:
    """Joined query and key weights belong to the attention, and their gradients to each projection."""
    queries, keys = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 2, bias=False)
    whole = torch.ones(6, 4)
    queries.weight.data, keys.weight.data = whole[:4], whole[4:]
    keys.weight.grad = torch.ones(2, 4)
    attention = torch.nn.ModuleDict({"q": queries, "k": keys})
    model = torch.nn.ModuleDict({"attention": attention, "other": torch.nn.Linear(4, 4, bias=False)})

    counts: dict[str, int] = {}
    for path, tensors in by_module(model, None):
        counts[path] = counts.get(path, 0) + len(tensors)

    assert {path: count for path, count in counts.items() if count} == {"attention": 2, "attention.k": 1, "other": 1}


def test_wrappers_do_not_change_a_path() -> None:
    """A layer has the same path inside the wrappers of peft and torch.compile."""
    plain = "model.layers.*.self_attn.q_proj"
    assert path_of("model.layers.11.self_attn.q_proj") == plain
    assert path_of("base_model.model.model.layers.0.self_attn.q_proj.base_layer") == plain
    assert path_of("_orig_mod.model.layers.3.self_attn.q_proj") == plain


def test_each_operator_is_a_range_of_the_profiler() -> None:
    """Under torch's profiler each operator, forward and backward, has a range that names its module."""
    model = Model()
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with following() as places, torch.profiler.profile(activities=kinds) as profiler, NamedRanges(places.here):
        model(torch.ones(2, 4)).sum().backward()

    ranges, work = ranges_and_work(profiler.profiler.kineto_results.events())

    named = [(each.module, each.operator) for each in ranges]
    assert named.count(("layers.*", "aten.sin.default")) == 3
    assert named.count(("layers.*", "aten.cos.default")) == 3
    assert all(each.start_ns <= each.end_ns for each in ranges)
    assert work == []  # no GPU
