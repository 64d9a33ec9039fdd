"""Recorders of memory: known bytes on a schedule are seen exactly, by owner and by phase."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hpc_core.instruments.allocations import AllocatorHistory, StorageWatch
from hpc_core.instruments.owners import gradient_tensors, optimizer_tensors, owned_bytes, weight_tensors

KIB = 1024


def _bytes(kib: int) -> torch.Tensor:
    return torch.empty(kib * KIB, dtype=torch.uint8)


def _scheduled(watch: StorageWatch) -> None:
    watch("first")
    kept = _bytes(100)
    passing = _bytes(50)
    del passing
    watch("second")
    _bytes(30)
    watch("third")
    last = _bytes(80)
    del kept, last


def test_known_bytes_on_a_schedule_are_seen_exactly() -> None:
    """Births and deaths give the peaks of each phase and the owners at the peak to the byte."""
    watch = StorageWatch(("first", "second", "third"))
    with watch:
        _scheduled(watch)
    peaks = watch.timeline.peaks_by_phase(("first", "second", "third"))
    assert peaks == {"first": 150 * KIB, "second": 130 * KIB, "third": 180 * KIB}
    seen = {name: value for name, value in watch.timeline.at_peak().items() if value}
    assert seen == {"activations": 100 * KIB, "temporaries": 80 * KIB}


def test_two_runs_record_the_same() -> None:
    """The record of a schedule is the same every time."""
    seen = []
    for _ in range(2):
        watch = StorageWatch(("first", "second", "third"))
        with watch:
            _scheduled(watch)
        seen.append(watch.timeline)
    assert seen[0] == seen[1]
    assert len(seen[0].allocations) == 4


def test_views_and_operators_in_place_add_nothing() -> None:
    """A storage counts once, however many tensors look at it."""
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


def test_what_was_there_before_is_other_from_the_start() -> None:
    """Memory that the step takes but did not make counts in full, as nobody's, and not as born in the step."""
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
    """Weights claimed before and gradients claimed within a step are theirs at the peak, to the byte."""
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
    """Many short-lived tensors one after another each count, and never together."""
    watch = StorageWatch(("step",))
    with watch:
        watch("step")
        for _ in range(100):
            _bytes(4)
    assert len(watch.timeline.allocations) == 100
    assert watch.timeline.peak()[1] == 4 * KIB


def test_owned_bytes_count_each_storage_once() -> None:
    """Tied and viewed tensors are counted once, in full."""
    table = torch.ones(16, 16)
    assert owned_bytes([table, table.t(), table[0], torch.ones(2, dtype=torch.float16)]) == 16 * 16 * 4 + 4
    assert owned_bytes([]) == 0


def test_owners_of_a_training_step_are_found() -> None:
    """Weights and buffers, gradients and two moments with a count, each by its bytes."""
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


class _Told(AllocatorHistory):
    """A history whose entries are told instead of read from an allocator."""

    def __init__(self) -> None:
        super().__init__(torch.device("cuda", 0), ("forward", "backward"))
        self.told: list[dict[str, Any]] = []

    def _position(self) -> int:
        return len(self.told)

    def _entries(self) -> list[dict[str, Any]]:
        return self.told


def test_an_allocators_history_is_replayed_with_phases_and_owners() -> None:
    """Addresses that are used again, owners named between events, and frees of memory from before fall into place."""
    tensor = torch.empty(10, dtype=torch.uint8)
    address = tensor.untyped_storage().data_ptr()
    history = _Told()
    history("forward")
    history.told += [_entry("alloc", address, 100), _entry("alloc", 2, 30)]
    history.own_now("gradients", [tensor])
    history("backward")
    history.told += [_entry("free_requested", address, 100)]
    history.told += [_entry("alloc", address, 7), _entry("free_requested", 12345, 1)]
    timeline = history._replay(history.told)
    assert [(piece.size_bytes, piece.phase, piece.died_in, piece.category) for piece in timeline.allocations] == [
        (100, 0, 1, "gradients"), (30, 0, None, None), (7, 1, None, None),
    ]  # fmt: skip
    assert timeline.peaks_by_phase(("forward", "backward")) == {"forward": 130, "backward": 130}
    assert sum(timeline.at_peak().values()) == 130


def test_an_unknown_phase_is_refused() -> None:
    """A mark that is not among the phases is an error, not a phase of its own."""
    with pytest.raises(ValueError, match="decode"):
        StorageWatch(("forward",))("decode")
