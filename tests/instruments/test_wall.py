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


def timed(waited_s: list[float], monkeypatch: pytest.MonkeyPatch) -> WallTimer:
    """Time as many calls as there are entries; in each, the thread waits so long for a core."""
    waiting = [0.0]
    monkeypatch.setattr(wall, "_waited_s", lambda: waiting[0])
    timer = WallTimer(CPU)
    for extra in waited_s:

        def call(extra: float = extra) -> None:
            waiting[0] += extra
            time.sleep(0.001)

        timer.time(call)
    timer.finish()
    return timer


def test_the_value_is_of_calls_that_did_not_wait_for_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that waited is left out of the value and named in the note; every sample is kept."""
    found = timed([0.0, 9.0, 0.0], monkeypatch).metrics("step_s")
    samples = found["step_s"].samples
    assert samples is not None
    assert found["step_s"].value == pytest.approx((samples[0] + samples[2]) / 2)
    assert found["step_s"].note == f"1 of 3 {WAITED}"
    assert found["step_s"].gated


def test_a_time_is_not_judged_where_most_calls_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    """With most of it disturbed, the time is shown and not judged."""
    found = timed([9.0, 0.0, 9.0], monkeypatch).metrics("step_s")
    assert not found["step_s"].gated
    assert "2 of 3 waited" in str(found["step_s"].note)


def test_a_timer_that_was_not_finished_is_refused() -> None:
    """The last call needs a canary after it."""
    timer = WallTimer(CPU)
    timer.time(lambda: None)
    with pytest.raises(ValueError, match="canary after it"):
        timer.metrics("step_s")


def test_a_host_that_is_twice_as_slow_changes_seconds_and_not_canaries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call of three laps: each lap and canary takes twice as long from the second call on. A canary runs in no lap."""
    clock, slow = [0.0], [1.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(wall.WallTimer, "_canary", lambda self: wall._Run(work(0.001), 0.0))

    def work(seconds: float) -> float:
        clock[0] += slow[0] * seconds
        return slow[0] * seconds

    def call() -> None:
        for _ in range(3):
            work(0.02)
            timer.lap()

    timer = WallTimer(CPU)
    for factor in (1.0, 2.0, 2.0):
        slow[0] = factor
        timer.time(call)
    timer.finish()
    whole, laps = timer.metrics("query_s"), timer.metrics("decode_token_s", slice(1, -1), whole=False)
    assert whole["query_s"].samples == pytest.approx((0.06, 0.12, 0.12))
    assert laps["decode_token_s"].samples == pytest.approx([0.02] * 2 + [0.04] * 4)
    assert laps["decode_token_per_canary"].value == pytest.approx(20)


def test_waiting_is_found_in_the_line_that_waits() -> None:
    """A sleep and a lock are found where they are asked for, not in the standard library, with the seconds of one step."""
    times = host_times(Sleeper(), CPU).host_times
    assert {each.function for each in times} == {"Sleeper.step"}
    first, second = Sleeper.step.__code__.co_firstlineno + 2, Sleeper.step.__code__.co_firstlineno + 6
    by_line = {each.line: each.seconds for each in times}
    assert by_line[first] > by_line[second] > 0
    assert sum(by_line.values()) >= 0.02
