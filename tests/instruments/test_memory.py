"""Recorders of memory give the exact bytes of a schedule, by owner and by phase."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from hpc_core.instruments.allocations import AllocatorHistory, StorageWatch
from hpc_core.instruments.owners import gradient_tensors, living_tensors, optimizer_tensors, owned_bytes, weight_tensors
from hpc_core.instruments.timeline import Timeline

KIB = 1024


def _bytes(kib: int) -> torch.Tensor:
    return torch.empty(kib * KIB, dtype=torch.uint8)


def _scheduled(watch: StorageWatch) -> None:
    watch("first")
    long_lived = _bytes(100)
    temporary = _bytes(50)
    del temporary
    watch("second")
    _bytes(30)
    watch("third")
    last = _bytes(80)
    del long_lived, last


def _timeline() -> Timeline:
    watch = StorageWatch(("first", "second", "third"))
    with watch:
        _scheduled(watch)
    return watch.timeline


def test_a_schedule_of_known_bytes_is_recorded_exactly() -> None:
    """The peak of each phase and the owners at the peak are exact, and the same in a second run."""
    timeline = _timeline()
    peaks = timeline.peaks_by_phase(("first", "second", "third"))
    assert peaks == {"first": 150 * KIB, "second": 130 * KIB, "third": 180 * KIB}
    owners = {name: value for name, value in timeline.at_peak().items() if value}
    assert owners == {"activations": 100 * KIB, "temporaries": 80 * KIB}
    assert len(timeline.allocations) == 4
    assert timeline == _timeline()


def test_views_and_in_place_operators_add_nothing() -> None:
    """A storage counts once, however many tensors use it."""
    watch = StorageWatch(("step",))
    with watch:
        watch("step")
        made = torch.zeros(256, 4)
        views = [made.t(), made[3:], made.view(-1), made.detach(), made.unsqueeze(0).expand(7, 256, 4)]
        made.add_(1).mul_(2)
        torch.add(made, 1, out=made)
    assert len(views) == 5
    assert watch.timeline.peak()[1] == 256 * 4 * 4
    assert len(watch.timeline.allocations) == 1


def test_memory_from_before_the_step_is_other() -> None:
    """Memory that the step uses but did not allocate counts in full as `other`."""
    weight, target = torch.ones(100, 10), torch.ones(10)
    watch = StorageWatch(("step",))
    with watch:
        watch("step")
        made = _bytes(1)
        product = weight.t().contiguous()
        torch.add(target, 1, out=target)
    assert (made.nbytes, product.nbytes) == (KIB, 4000)
    assert watch.timeline.peak()[1] == 4000 + 40 + KIB + 4000
    assert watch.timeline.at_peak()["other"] == 4000 + 40


def test_owners_are_named_before_and_during_the_step() -> None:
    """Weights named before and gradients named during a step are at the peak with their exact bytes."""
    model = torch.nn.Linear(64, 32, bias=False)
    inputs = torch.ones(8, 64)
    watch = StorageWatch(("forward", "backward"))
    watch.own("weights", model.parameters())
    with watch:
        watch("forward")
        loss = model(inputs).sum()
        watch("backward")
        loss.backward()
        watch.own("gradients", gradient_tensors(model))
    totals = watch.timeline.at_peak()
    assert totals["weights"] == totals["gradients"] == 64 * 32 * 4
    assert totals["other"] == inputs.nbytes


def test_a_reused_address_is_another_allocation() -> None:
    """A hundred short-lived tensors are a hundred allocations, and never add up."""
    watch = StorageWatch(("step",))
    with watch:
        watch("step")
        for _ in range(100):
            _bytes(4)
    assert len(watch.timeline.allocations) == 100
    assert watch.timeline.peak()[1] == 4 * KIB


def test_owned_bytes_count_each_storage_once() -> None:
    """Tied tensors and views count once, in full."""
    table = torch.ones(16, 16)
    assert owned_bytes([table, table.t(), table[0], torch.ones(2, dtype=torch.float16)]) == 16 * 16 * 4 + 4
    assert owned_bytes([]) == 0


def test_owners_of_a_training_step_are_found() -> None:
    """Weights and buffers, gradients, and AdamW's moments and step counts have their exact bytes."""
    model = torch.nn.BatchNorm1d(10)
    optimizer = torch.optim.AdamW(model.parameters())
    assert owned_bytes(weight_tensors(model)["weights"]) == 4 * 10 * 4 + 8  # weight, bias, mean, variance, counter
    assert gradient_tensors(model) == []
    model(torch.randn(4, 10)).sum().backward()
    assert owned_bytes(gradient_tensors(model)) == 2 * 10 * 4
    optimizer.step()
    assert owned_bytes(optimizer_tensors(optimizer)) == 2 * (2 * 10 * 4 + 4)


def _entry(action: str, address: int, size: int) -> dict[str, Any]:
    return {"action": action, "addr": address, "size": size}


class _MadeUpHistory(AllocatorHistory):
    """A history with made-up entries in place of an allocator's."""

    def __init__(self) -> None:
        super().__init__(torch.device("cuda", 0), ("forward", "backward"))
        self.entries: list[dict[str, Any]] = []

    def _position(self) -> int:
        return len(self.entries)

    def _entries(self) -> list[dict[str, Any]]:
        return self.entries


def test_an_allocators_history_is_replayed_with_phases_and_owners() -> None:
    """Reused addresses, owners named between events, and frees of earlier memory are replayed correctly."""
    tensor = torch.empty(10, dtype=torch.uint8)
    address = tensor.untyped_storage().data_ptr()
    history = _MadeUpHistory()
    history("forward")
    history.entries += [_entry("alloc", address, 100), _entry("alloc", 2, 30)]
    history.own_now("gradients", [tensor])
    history("backward")
    history.entries += [_entry("free_requested", address, 100)]
    history.entries += [_entry("alloc", address, 7), _entry("free_requested", 12345, 1)]
    timeline = history._replay(history.entries)
    assert [(piece.size_bytes, piece.phase, piece.died_in, piece.category) for piece in timeline.allocations] == [
        (100, 0, 1, "gradients"), (30, 0, None, None), (7, 1, None, None),
    ]  # fmt: skip
    assert timeline.peaks_by_phase(("forward", "backward")) == {"forward": 130, "backward": 130}
    assert sum(timeline.at_peak().values()) == 130


def test_tensors_without_memory_count_nothing() -> None:
    """A fake tensor, such as torch.compile keeps, names the CPU but has its storage on "meta", like a meta tensor."""
    with FakeTensorMode():
        fake = torch.empty(100 * KIB)
    watch = StorageWatch(("step",))
    with watch:
        watch("step")
        held = torch.empty(100 * KIB, device="meta") + 1
    assert (fake.device.type, held.device.type) == ("cpu", "meta")
    assert not any(tensor is fake for tensor in living_tensors(torch.device("cpu")))
    assert watch.timeline.peak() == (0, 0)


def test_an_unknown_phase_is_refused() -> None:
    """A mark that is not among the phases is an error."""
    with pytest.raises(ValueError, match="decode"):
        StorageWatch(("forward",))("decode")
