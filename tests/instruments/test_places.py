"""Which module is at work, on real modules: in the forward, in the backward, in recomputation, and after an error."""

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
    """A layer with a part of its own work: a sum that is no module's but the block's."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A sum around a product."""
        return torch.sin(self.up(x)) + x


class Model(torch.nn.Module):
    """Three layers, recomputed if asked."""

    def __init__(self, *, recompute: bool = False) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Block() for _ in range(3))
        self.recompute = recompute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Layer after layer."""
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
        return watch, {path: each.calls for path, each in places.seen().items()}


def test_operators_are_laid_at_their_modules_door() -> None:
    """Forward and backward work of a layer's part, and of the layer itself, is found under their paths, three layers as one."""
    watch, calls = watched(Model())

    assert watch.uses["layers.*.up", "forward", "aten.addmm.default"] == 3
    assert watch.uses["layers.*", "forward", "aten.sin.default"] == 3
    assert watch.uses["layers.*", "backward", "aten.cos.default"] == 3
    assert watch.uses["layers.*.up", "backward", "aten.mm.default"] == 5  # the first layer's input takes no gradient
    assert calls == {"Model": 1, "layers.*": 3, "layers.*.up": 3}


def test_recomputed_forwards_are_counted_and_left() -> None:
    """A recomputation that stops as soon as it has what it needs leaves its modules, and counts as a forward."""
    watch, calls = watched(Model(recompute=True))

    assert (calls["layers.*"], calls["layers.*.up"]) == (6, 6)
    assert watch.uses["layers.*", "backward", "aten.cos.default"] == 3


def test_after_an_error_nothing_is_at_work() -> None:
    """A forward that raises is left like any other."""
    with following() as places:
        with pytest.raises(RuntimeError):
            Model()(torch.ones(2, 3))
        assert places.here() == ""


def test_parameters_gradients_and_state_have_an_owner() -> None:
    """Weights, gradients and optimizer state are found under the module whose they are."""
    model = Model()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()

    found = [(path, len(tensors)) for path, tensors in by_module(model, optimizer)]

    assert {path for path, _ in found} == {"layers.*.up"}
    assert (
        sum(count for _, count in found) == 6 * 2 + 6 * 3
    )  # weight and bias of each with gradient, step and two moments


def test_parameters_in_one_storage_are_those_of_the_module_around_them() -> None:
    """As of queries, keys and values that are one product: no one of the three is said to hold what all three do; gradients are each one's own."""
    queries, keys = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 2, bias=False)
    whole = torch.ones(6, 4)
    queries.weight.data, keys.weight.data = whole[:4], whole[4:]
    keys.weight.grad = torch.ones(2, 4)
    attention = torch.nn.ModuleDict({"q": queries, "k": keys})
    model = torch.nn.ModuleDict({"attention": attention, "other": torch.nn.Linear(4, 4, bias=False)})

    found: dict[str, int] = {}
    for path, tensors in by_module(model, None):
        found[path] = found.get(path, 0) + len(tensors)

    assert {path: count for path, count in found.items() if count} == {"attention": 2, "attention.k": 1, "other": 1}


def test_wrappers_do_not_change_a_path() -> None:
    """The same layer has the same path with and without peft's and torch.compile's wrappers."""
    plain = "model.layers.*.self_attn.q_proj"
    assert path_of("model.layers.11.self_attn.q_proj") == plain
    assert path_of("base_model.model.model.layers.0.self_attn.q_proj.base_layer") == plain
    assert path_of("_orig_mod.model.layers.3.self_attn.q_proj") == plain


def test_each_operator_is_a_range_of_the_profiler() -> None:
    """Under torch's real profiler every operator lies in a range that says for which module it runs, in both directions."""
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
