"""Counts of what the host executes: exact, by function, without what observes."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpc_core.instruments.compilations import Compilations
from hpc_core.instruments.host import HostCounter, further_passes, host_cost, query_cost, step_cost


def turn() -> int:
    """One call that loops ten times and calls len once a turn."""
    total = 0
    for _ in range(10):
        total += len("ab")
    return total


def turns(count: int) -> Callable[[], None]:
    """A step of this many calls."""

    def step() -> None:
        for _ in range(count):
            turn()

    return step


def numbers(step: Callable[[], object]) -> dict[str, int]:
    """What a second run of this step costs."""
    step()
    return host_cost(step).totals()


@given(st.integers(0, 20), st.integers(0, 20))
def test_cost_is_linear_in_the_calls(few: int, more: int) -> None:
    """Each further call costs the same bytecodes, one Python call and eleven calls into C: range, and ten of len."""
    none, one = numbers(turns(0)), numbers(turns(1))
    each = {name: one[name] - none[name] for name in one}
    assert (each["python_calls"], each["c_calls"]) == (1, 11 if sys.version_info >= (3, 12) else 10)
    for count in (few, more):
        assert numbers(turns(count)) == {name: none[name] + count * each[name] for name in none}


def test_the_same_step_costs_the_same_every_time() -> None:
    """A step of a small model is counted to the bytecode, backward and optimizer included."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    rows = torch.ones(2, 4)

    def step() -> None:
        optimizer.zero_grad()
        model(rows).sum().backward()
        optimizer.step()

    assert [numbers(step) for _ in range(3)] == [numbers(step)] * 3


def test_functions_are_named_with_file_and_line_and_add_up() -> None:
    """The rows of functions add up to the totals, and name where each function begins."""
    step = turns(3)
    step()
    cost = host_cost(step)
    rows = cost.functions("step")
    assert {
        "bytecodes": sum(row.bytecodes for row in rows),
        "python_calls": sum(row.calls for row in rows),
        "c_calls": sum(row.c_calls for row in rows),
    } == cost.totals()
    first = rows[0]
    assert (first.work, first.function, first.calls) == ("step", "turn", 3)
    assert first.file.endswith("test_host.py")
    assert first.line == turn.__code__.co_firstlineno


def test_a_query_is_split_into_prefill_and_tokens() -> None:
    """The cost of decoded tokens is that of the whole query without that of one with a single token."""
    first, whole = (host_cost(turns(count)) for count in (1, 5))
    metrics = query_cost(first, whole, 4, on_gpu=False).metrics
    assert metrics["python_calls"].value == 6  # the step itself, and five calls
    assert (metrics["python_calls_decode"].value, metrics["python_calls_decode"].unit) == (4, "1 per 4 tokens")


def test_code_that_stands_for_hardware_is_not_counted() -> None:
    """A decorated function costs nothing, whatever it calls; what comes after it counts again."""
    pausing = HostCounter.pausing(turns(50))

    def step() -> None:
        pausing()
        turn()

    plain = numbers(turns(1))
    found = numbers(step)
    assert found["python_calls"] == plain["python_calls"]
    assert found["bytecodes"] < plain["bytecodes"] + 20
    assert pausing() is None  # outside of a count, it only calls


def test_a_thread_of_the_works_own_is_not_counted() -> None:
    """A thread that Python code starts does other work: its Python does not count."""

    def step(work: Callable[[], object]) -> None:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    cost = host_cost(functools.partial(step, turns(100)))
    assert "turn" not in {row.function for row in cost.functions("")}


def test_a_tracer_that_was_there_is_there_again() -> None:
    """A debugger or a coverage tool goes on after the count, and after a step that raises."""

    def tracer(*_: object) -> None:
        return None

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        host_cost(turns(1))
        with contextlib.suppress(ZeroDivisionError):
            host_cost(lambda: 1 // 0)
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)


kept: list[list[int]] = []


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    """Empty the list that a step leaves objects in."""
    yield
    kept.clear()


@pytest.mark.parametrize("count", [0, 1, 7])
def test_objects_that_a_step_leaves_behind_are_counted(count: int) -> None:
    """A step that appends lists to a global list keeps exactly as many objects; garbage is not kept, cycles included."""

    def step() -> None:
        kept.extend([index] for index in range(count))
        cycle: list[object] = []
        cycle.append(cycle)

    assert further_passes(step, on_gpu=False).metrics["kept_objects"].value == count


@pytest.mark.parametrize("count", [0, 1, 5])
def test_each_wait_is_counted_however_short(count: int) -> None:
    """A sleep, a blocked read and a lock that another thread holds count once each; computing on several threads does not."""
    left = torch.ones(256, 256)

    def step() -> None:
        left @ left
        for _ in range(count):
            time.sleep(1e-4)

    assert further_passes(step, on_gpu=False).metrics["waits"].value == 4 * count


def test_a_wait_in_every_second_step_is_counted() -> None:
    """A step that sleeps only now and then waits too: the median of its times may not show it."""
    turns_taken = itertools.count()

    def step() -> None:
        if next(turns_taken) % 2:
            time.sleep(1e-4)

    assert further_passes(step, on_gpu=False).metrics["waits"].value == 2


def test_a_blocked_read_and_a_lock_are_waits() -> None:
    """Whatever gives up the core counts, not only a sleep."""

    def step() -> None:
        source, sink = os.pipe()
        writer = threading.Timer(0.01, os.write, (sink, b"x"))
        writer.start()
        os.read(source, 1)
        writer.join()
        os.close(source)
        os.close(sink)

    assert further_passes(step, on_gpu=False).metrics["waits"].value >= 1


def test_a_cache_that_fills_is_no_leak() -> None:
    """An object that only the first passes make is not one that each pass leaves behind."""

    @functools.cache
    def remembered(number: int) -> list[int]:
        return [number]

    passes = iter(range(100))
    assert further_passes(lambda: remembered(min(next(passes), 2)), on_gpu=False).metrics["kept_objects"].value == 0


def test_counts_depend_on_pythons_minor_version() -> None:
    """On a CPU counts hold for a case, a stack and a minor version of Python; on a GPU for the machine too."""
    on_cpu, on_gpu = (step_cost(turns(1), on_gpu=each).metrics["bytecodes"].depends_on for each in (False, True))
    assert on_cpu == ("case", "stack", "python")
    assert on_gpu == ("case", "stack", "machine", "python")


def test_counting_waits_compiles_nothing_again() -> None:
    """A compiled function is guarded by the number of threads, so it keeps them."""
    x, threads = torch.ones(4), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        double = torch.compile(lambda x: x * 2, backend="eager")
        double(x)
        before = Compilations.now()
        further_passes(lambda: double(x), on_gpu=False)
        found = before.findings(torch.device("cpu")).metrics["recompilations"]
    finally:
        torch.set_num_threads(threads)
    assert found.value == 0, found.note
