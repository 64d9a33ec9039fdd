"""A fed program gets the same batches and losses as one with resident batches, and its record shows what feeding costs."""

from __future__ import annotations

import functools
import gc
import os
import time
from typing import Any, cast

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpc_core.audit.loader import feed_facts
from hpc_core.builders.assemble import Built, build
from hpc_core.builders.data import loader
from hpc_core.builders.data.batching import Block, BlockSource
from hpc_core.builders.data.device_batches import Resident
from hpc_core.builders.data.loader import Fed, HostBatch, host_batch
from hpc_core.case.case import Case
from hpc_core.case.parts import DataSpec, ModelSpec
from hpc_core.case.workloads import FeedSpec, FinetuneSpec
from hpc_core.catalogue import TINY_DATA, finetune, lora
from hpc_core.engines.finetune import fed_batches, resident_batches
from hpc_core.engines.tuned.program import training_program
from hpc_core.record.job import Job
from hpc_core.record.record import Record
from hpc_core.worker.feed import Rates, feed_cost, same_losses, what_bounds
from hpc_core.worker.perform import perform

CPU = torch.device("cpu")
TEXTS = DataSpec(source="embedded", name="paragraphs", rows=40)
PACKED: dict[str, Any] = {"batch": 2, "length": 32, "packing": True, "data": TEXTS, "steps": 5}
PADDED: dict[str, Any] = {"batch": 2, "length": 48, "padding": "longest", "data": TEXTS, "steps": 7}
LAYOUTS = {"packed": PACKED, "padded": PADDED}


def _case(layout: dict[str, Any], method: Any = None, **feed: Any) -> Case:
    case = finetune(ModelSpec(shape="tiny", dtype="float32"), method or lora(dropout=0.0), learning_rate=1e-3, **layout)
    return case.vary("lora-fed", way="loader", **feed) if feed else case


@functools.cache
def _built() -> Built:
    return build(_case(PACKED), CPU)


def _workload(case: Case) -> FinetuneSpec:
    assert isinstance(case.workload, FinetuneSpec)
    return case.workload


@functools.cache
def _resident(case: Case) -> Resident:
    return resident_batches(_built(), _workload(case))[0]


@functools.cache
def _source(layout: str, tokenize: str) -> BlockSource:
    return fed_batches(_built(), _workload(_case(LAYOUTS[layout], tokenize=tokenize)))[0].source


def _equal(batch: Any, expected: Any) -> bool:
    pairs = [(batch.ids, expected.ids), (batch.labels, expected.labels)]
    if expected.mask is not None:
        pairs.append((batch.mask, expected.mask))
    counts = (batch.tokens, batch.padded) == (expected.tokens, expected.padded)
    return (batch.mask is None) == (expected.mask is None) and counts and all(torch.equal(*pair) for pair in pairs)


actions = st.lists(st.tuples(st.sampled_from(["step", "jump", "index", "watched"]), st.integers(0, 20)), max_size=25)


@given(actions, st.integers(0, 3), st.sampled_from(["packed", "padded"]), st.sampled_from(["cached", "fetch"]))
def test_a_step_gets_the_batch_of_its_number(
    performed: list[tuple[str, int]], ahead: int, layout: str, tokenize: str
) -> None:
    """Whatever the order of steps, jumps, reads by index and watched steps, each step gets the resident batch."""
    resident = _resident(_case(LAYOUTS[layout]))
    feed = FeedSpec(way="loader", ahead=ahead)
    fed = Fed(_source(layout, tokenize), feed, len(resident), CPU, "")
    at = 0
    for action, number in performed:
        if action == "index":
            index = number % len(fed)
            assert _equal(fed[index], resident[index])
        elif action == "watched":
            with fed.by_index():
                assert _equal(fed.take(number), resident.take(number))
                fed.taken()
        else:
            at = at if action == "step" else number
            assert _equal(fed.take(at), resident.take(at))
            fed.taken()
            at += 1
    fed.clear()


def test_two_workers_make_the_same_batches_and_end() -> None:
    """With two workers and two batches ahead, three epochs give every batch in order, from two processes, which then end."""
    case = _case(PADDED, workers=2, ahead=2)
    resident, fed = _resident(case), fed_batches(_built(), _workload(case))[0]
    for index in range(3 * len(resident)):
        assert _equal(fed.take(index), resident.take(index))
        fed.taken()
    makers = fed.observed.makers
    assert len(makers - {os.getpid()}) == len(makers) == 2
    assert fed.observed.ahead == {2}
    fed.clear()
    psutil.wait_procs([psutil.Process(pid) for pid in makers if psutil.pid_exists(pid)], timeout=5)
    assert not [pid for pid in makers if psutil.pid_exists(pid)]


def _losses(case: Case, steps: int = 12) -> list[float]:
    program = training_program(build(case, CPU), case, _workload(case))
    losses = []
    for _ in range(steps):
        program.step()
        assert program.loss is not None
        losses.append(float(program.loss))
    program.release()
    return losses


@pytest.mark.parametrize("engine", ["stock", "tuned"])
@pytest.mark.parametrize("layout", [PACKED, PADDED], ids=["packed", "padded"])
def test_fed_steps_train_like_resident_ones(layout: dict[str, Any], engine: str) -> None:
    """Twelve steps, which is more than one epoch, give equal losses bit for bit, with dropout too."""
    tuned: dict[str, Any] = {"engine": "tuned", "loss": "chunked", "fusion": "blocks"} if engine == "tuned" else {}
    method = lora(dropout=0.0 if tuned else 0.1)
    resident = _losses(_case(layout | tuned, method))
    assert _losses(_case(layout | tuned, method, ahead=2)) == resident
    assert len(set(resident)) == len(resident)


@functools.cache
def _record(case_id: str) -> Record:
    case = next(case for case in TINY_DATA if case.id == case_id)
    return perform(Job(case=case, launched="inline"), lambda _: None)


def test_the_record_says_what_the_feed_costs() -> None:
    """A fed record has times, waits, rates and the bottleneck; bytes and losses equal the resident case's, with two copies more."""
    record, resident = _record("tiny/data-w2-ahead-fetch"), _record("tiny/data-resident")
    assert record.status == "ok", record.reasons
    names = ("feed_step_s", "feed_resident_step_s", "feed_wait_s", "feed_make_s", "feed_batches_per_s")
    assert all(record.metrics[name].value > 0 and not record.metrics[name].gated for name in names)
    assert "feed_idle_s" not in record.metrics  # there is no GPU to idle
    facts = {name: fact.seen for name, fact in record.audit.items() if name.startswith("feed_")}
    same = "4 of 4 equal those of resident batches"
    assert facts == {
        "feed_tokenize": "fetch", "feed_workers": 2, "feed_pinned": False, "feed_ahead": 2, "feed_losses": same,
    }  # fmt: skip
    assert any(": bound by" in note and "2 workers make" in note for note in record.circumstances.notes)
    # On a noisy machine one run may warm up longer and then start from other weights: compare only common steps.
    workload = record.case.workload
    assert isinstance(workload, FinetuneSpec)
    runs = record.losses, resident.losses
    common = min(map(len, runs)) - (0 if len(runs[0]) == len(runs[1]) else workload.steps)
    assert common > 0
    assert runs[0][:common] == runs[1][:common]
    assert not [name for name in resident.metrics if name.startswith("feed")]
    assert record.metrics["operators"].value == resident.metrics["operators"].value + 2
    assert record.metrics["peak_bytes"].value == resident.metrics["peak_bytes"].value


def test_pinning_without_a_gpu_is_a_mismatch() -> None:
    """Without a GPU the fact `feed_pinned` fails and says why."""
    fed = fed_batches(_built(), _workload(_case(PACKED, pinned=True)))[0]
    fed.take(0)
    facts = feed_facts(fed.feed, fed, on_gpu=False, copies_apart=None).facts
    assert {name for name, fact in facts.items() if not fact.holds} == {"feed_pinned"}
    assert facts["feed_pinned"].seen == "off: page-locked memory needs a GPU"


def test_another_batch_is_found_by_its_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """If one token of one batch changes, four of five losses are equal."""

    def spoiled(source: Any, index: int) -> HostBatch:
        batch = host_batch(source, index)
        if index == 1:
            batch.ids[0, 0] = 3 if batch.ids[0, 0] != 3 else 4
        return batch

    case = _case(PACKED, ahead=1)
    program = training_program(build(case, CPU), case, _workload(case))
    assert isinstance(program.batches, Fed)
    assert same_losses(program, program.batches, _resident(case), seed=0).holds
    monkeypatch.setattr(loader, "host_batch", spoiled)
    fact = same_losses(program, program.batches, _resident(case), seed=0)
    assert (fact.asked, fact.seen) == tuple(f"{count} of 5 equal those of resident batches" for count in (5, 4))


def test_a_pass_has_the_same_batches_fed_and_resident(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fed and resident passes time batches of the same widths, although the loader continues from pass to pass."""
    case = _case(PADDED, workers=1, ahead=1)
    program = training_program(build(case, CPU), case, _workload(case))
    fed = program.batches
    assert isinstance(fed, Fed)
    widths: dict[str, list[int]] = {"fed": [], "resident": []}
    train = program.train_on

    def train_and_note_width(batch: Any, *rest: Any) -> None:
        widths["fed" if program.batches is fed else "resident"].append(batch.ids.shape[1])
        train(batch, *rest)

    monkeypatch.setattr(program, "train_on", train_and_note_width)
    feed_cost(program, fed, _resident(case), CPU)
    program.release()
    assert len(set(widths["fed"])) > 1
    assert widths["fed"] == widths["resident"]


def test_a_hanging_worker_ends_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that never arrives raises an error with the timeout, and the worker ends."""
    monkeypatch.setattr(loader, "host_batch", lambda source, index: time.sleep(2.0))
    monkeypatch.setattr(loader, "_PATIENCE_S", 0.3)
    others = set(psutil.Process().children())
    fed = fed_batches(_built(), _workload(_case(PACKED, workers=1)))[0]
    with pytest.raises(RuntimeError, match=r"timed out after 0\.3 seconds"):
        fed.take(0)
    [worker] = set(psutil.Process().children()) - others
    fed.clear()
    assert not psutil.wait_procs([worker], timeout=15)[1]


def test_a_worker_never_collects_inherited_garbage() -> None:
    """Inherited garbage may contain CUDA events, so a worker freezes it and collects only its own; the parent does not."""

    class Source:
        def block(self, index: int) -> Block:
            return Block(np.array([[gc.get_freeze_count(), gc.isenabled()]]), np.array([2]))

        masked = False

    before = gc.get_freeze_count(), gc.isenabled()
    supply = loader.supply(cast("BlockSource", Source()), FeedSpec(way="loader", workers=1), 1, on_gpu=False)
    frozen, collecting = next(supply).ids[0].tolist()
    assert frozen > 10_000
    assert collecting
    assert (gc.get_freeze_count(), gc.isenabled()) == before


FED = Rates(FeedSpec(way="loader"), fed_s=0.05, resident_s=0.05, wait_s=1e-4, idle_s=0.0, make_s=1e-4, supply_per_s=1e4)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({}, "bound by nothing: the training process makes 1e+04 batches/s by itself, training takes 20; the host waits"),
        ({"wait_s": 0.04, "idle_s": 0.0009}, "bound by nothing"),
        ({"idle_s": None, "wait_s": 0.04}, "bound by reading and collating in the training process"),
        ({"idle_s": 0.05, "supply_per_s": 10.0, "make_s": 0.1}, "bound by reading and collating: the training process makes 10"),
        (
            {"feed": FeedSpec(way="loader", tokenize="fetch", workers=2), "idle_s": 0.05, "supply_per_s": 19.0, "make_s": 0.1},
            "bound by tokenization: 2 workers make 19 batches/s by themselves, training takes 20; the host waits",
        ),
        (
            {"feed": FeedSpec(way="loader", workers=4), "idle_s": 0.05, "supply_per_s": 19.0},
            "bound by handing batches over between processes, which by what one takes for a batch could be 4e+04/s",
        ),
        ({"feed": FeedSpec(way="loader", workers=4), "idle_s": 0.01}, "bound by the way from the workers to the step"),
    ],
)  # fmt: skip
def test_the_bottleneck_is_named_with_numbers(changed: dict[str, Any], sentence: str) -> None:
    """The bottleneck follows from the GPU's idle time, or on a CPU from the wait, and is named with both rates."""
    text = what_bounds(Rates(**{**vars(FED), **changed}))
    assert text.startswith(sentence)
    assert ("the GPU idles" in text) == (changed.get("idle_s", 0.0) is not None)


def test_a_fed_program_holds_only_the_batches_in_flight() -> None:
    """Only the buffers in flight count as device bytes: one batch and those ahead, each of the largest width."""
    case = _case(PADDED, ahead=2)
    fed, resident = fed_batches(_built(), _workload(case))[0], _resident(case)
    assert isinstance(fed, Fed)
    widest = max(batch.ids.nbytes for batch in resident)
    assert fed.held_bytes() == 3 * 3 * widest
    assert resident.held_bytes() == 3 * sum(batch.ids.nbytes for batch in resident)
