"""Times beside the host canary, calls that waited for a core, and where the host spends its time."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from hpc_core.instruments import wall
from hpc_core.instruments.host_time import host_times
from hpc_core.instruments.program import Mark, unmarked
from hpc_core.instruments.wall import WallTimer
from hpc_core.record.metrics import WAITED

CPU = torch.device("cpu")


class Sleeper:
    """A step that sleeps in one line and waits for a lock in another."""

    phases: tuple[str, ...] = ("step",)
    period = 1

    def step(self, mark: Mark = unmarked) -> None:
        """Sleep 20 ms, then wait 10 ms."""
        time.sleep(0.02)
        lock = threading.Lock()
        lock.acquire()
        threading.Timer(0.01, lock.release).start()
        with lock:
            pass


def timed(waited_s: list[float], monkeypatch: pytest.MonkeyPatch) -> tuple[WallTimer, list[list[float]]]:
    """Time as many calls as there are entries; the thread then waited for a core as long in each canary and call before it."""
    waiting = [0.0]
    monkeypatch.setattr(wall, "_waited_s", lambda: waiting[0])
    timer, samples = WallTimer(CPU), []
    for extra in waited_s:

        def call(extra: float = extra) -> None:
            waiting[0] += extra
            time.sleep(0.001)

        samples.append([timer.time(call)])
    return timer, samples


def test_the_value_is_of_calls_that_did_not_wait_for_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that waited is left out of the value and named in the note; every sample is kept."""
    timer, samples = timed([0.0, 9.0, 0.0], monkeypatch)
    timer.finish()
    samples[1][0] = 1000.0
    found = timer.metrics("step_s", samples)
    assert found["step_s"].value < 1
    assert found["step_s"].samples == (samples[0][0], 1000.0, samples[2][0])
    assert found["step_s"].note == f"1 of 3 {WAITED}"
    assert found["step_s"].gated
    assert found["step_canaries"].value == pytest.approx(
        found["step_s"].value / timer.finish()["host_canary_s"].value, rel=9
    )


def test_a_time_is_not_judged_where_most_calls_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    """With most of it disturbed, the time is shown and not judged."""
    timer, samples = timed([9.0, 0.0, 9.0], monkeypatch)
    timer.finish()
    found = timer.metrics("step_s", samples)
    assert not found["step_s"].gated
    assert "2 of 3 waited" in str(found["step_s"].note)


def test_a_timer_that_was_not_finished_is_refused() -> None:
    """The last call needs a canary after it."""
    timer = WallTimer(CPU)
    samples = [[timer.time(lambda: None)]]
    with pytest.raises(ValueError, match="zip"):
        timer.metrics("step_s", samples)


def test_waiting_is_found_in_the_line_that_waits() -> None:
    """A sleep and a lock are found where they are asked for, not in the standard library, with the seconds of one step."""
    times = host_times(Sleeper(), CPU).host_times
    assert {each.function for each in times} == {"Sleeper.step"}
    first, second = Sleeper.step.__code__.co_firstlineno + 2, Sleeper.step.__code__.co_firstlineno + 6
    by_line = {each.line: each.seconds for each in times}
    assert by_line[first] > by_line[second] > 0
    assert sum(by_line.values()) >= 0.02
