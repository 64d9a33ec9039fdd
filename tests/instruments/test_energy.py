"""Joules between two readings of a counter: with a made-up counter and clock, and NVML's where there is a GPU."""

from __future__ import annotations

import functools
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpc_core.builders.assemble import build
from hpc_core.case.errors import MeasureError
from hpc_core.case.workloads import FinetuneSpec, GenerateSpec
from hpc_core.catalogue import finetune, generate, lora, tiny
from hpc_core.engines.generate import GenerateProgram, generate_program
from hpc_core.engines.tuned.program import training_program
from hpc_core.instruments import energy
from hpc_core.instruments.energy import LEAST_S, RENEWED_S, energy_of, step_energy, token_energy
from hpc_core.instruments.program import Mark, unmarked, weights_restored
from hpc_core.record.environment import gpu_energy_mj
from hpc_core.record.gpu_state import other_processes
from hpc_core.record.metrics import metric


class Board:
    """A clock that each step advances, and an energy counter that is renewed every `renewed_s`."""

    def __init__(self, step_s: float, watts: float, renewed_s: float = 0.0, start_s: float = 0.0) -> None:
        self.step_s, self.watts, self.renewed_s, self.now_s = step_s, watts, renewed_s, start_s

    def step(self) -> None:
        """Advance the clock."""
        self.now_s += self.step_s

    def clock(self) -> float:
        """The time in seconds."""
        return self.now_s

    def read_mj(self) -> int:
        """The counter in millijoules, which starts at seven kilojoules."""
        renewed_at = self.now_s if not self.renewed_s else self.now_s // self.renewed_s * self.renewed_s
        return int(renewed_at * self.watts * 1000) + 7_000_000


def test_energy_is_the_difference_of_two_readings() -> None:
    """Steps of 40 ms at 500 W take 20 J each, and are repeated for two seconds."""
    board = Board(0.04, 500.0)
    energy = energy_of(board.step, board.read_mj, clock=board.clock)
    assert energy.times in (50, 51)  # 50 times 0.04 may be rounded to less than 2
    assert energy.joules / energy.times == pytest.approx(20.0, rel=1e-4)
    assert energy.watts == pytest.approx(500.0, rel=1e-4)


@given(
    step_s=st.floats(0.001, 3.0), watts=st.floats(60.0, 700.0), start_s=st.floats(0.0, 10.0), whole=st.integers(1, 7)
)
def test_the_error_of_an_old_reading_is_bounded(step_s: float, watts: float, start_s: float, whole: int) -> None:
    """Whenever the counter is renewed, the power errs by at most the stated doubt, over whole rounds of steps."""
    board = Board(step_s, watts, RENEWED_S, start_s)
    energy = energy_of(board.step, board.read_mj, whole=whole, clock=board.clock)
    assert energy.seconds >= LEAST_S
    assert energy.times % whole == 0
    assert abs(energy.watts / watts - 1) <= energy.uncertainty + 1e-4
    assert energy.uncertainty <= RENEWED_S / LEAST_S


def test_a_counter_that_does_not_move_is_an_error() -> None:
    """A counter that does not move is an error with both readings."""
    board = Board(0.5, 0.0)
    with pytest.raises(MeasureError, match=r"7,000,000 to 7,000,000 mJ over 2\.00 s and 4 repetitions"):
        energy_of(board.step, board.read_mj, clock=board.clock)


@pytest.mark.parametrize(
    ("before", "during", "others"),
    [({}, {}, 0), ({"processes": 0}, {"processes": 1}, 0), ({"processes": 1}, {}, 1), ({}, {"processes": 3}, 2)],
)
def test_other_processes_on_the_gpu_are_counted(before: dict[str, int], during: dict[str, int], others: int) -> None:
    """Other processes are those before ours started, and those other than ours during the measurement."""
    assert other_processes(before, during) == others


_GPU = torch.device("cuda", 0)
_SHORT = metric("query_s", samples=[0.01])


def _simulate_gpu(monkeypatch: pytest.MonkeyPatch, states: list[dict[str, int]]) -> None:
    """Simulate a GPU whose NVML counts 100 J per reading and gives these states in turn."""
    readings = iter(range(0, 10**7, 100_000))
    remaining_states = iter(states)
    monkeypatch.setattr(energy, "energy_of", functools.partial(energy_of, least_s=0.05))
    monkeypatch.setattr(energy, "gpu_energy_mj", lambda: next(readings))
    monkeypatch.setattr(energy, "gpu_state", lambda: next(remaining_states))
    monkeypatch.setattr(energy, "synchronize", lambda _: None)


def _three_queries() -> GenerateProgram:
    """A program that answers three prompts, each with two rows of four new tokens."""
    case = generate(tiny, batch=2, prompts=3, prompt_length=8, new_tokens=4)
    assert isinstance(case.workload, GenerateSpec)
    return generate_program(build(case, torch.device("cpu")), case.workload)


def test_a_tokens_energy_is_that_of_whole_rounds_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 J are divided by the new tokens of whole rounds of three queries."""
    _simulate_gpu(monkeypatch, [{}, {"processes": 1}])
    metric = token_energy(_three_queries(), _GPU, query_s=_SHORT, gpu_before={}).metrics["energy_token_j"]
    queries = round(100 / metric.value / 8)
    assert 100 / metric.value / 8 == pytest.approx(queries)
    assert queries % 3 == 0
    assert metric.gated
    sentence = f"{queries * 8:,} new tokens, prefill included; whole board, idle power not subtracted: 100 J"
    assert sentence in str(metric.note)


class Step:
    """One matrix product, as a step of the user's own."""

    phases: tuple[str, ...] = ("step",)
    period = 1_000_000

    def step(self, mark: Mark = unmarked) -> None:
        """Multiply."""
        torch.ones(64, 64) @ torch.ones(64, 64)


def test_a_steps_energy_is_the_boards_over_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 J are divided by the steps that fit; if a round of different steps takes too long, the note says so."""
    _simulate_gpu(monkeypatch, [{}, {"processes": 1}])
    metric = step_energy(Step(), _GPU, step_s=_SHORT, gpu_before={}).metrics["energy_step_j"]
    steps = round(100 / metric.value)
    assert 100 / metric.value == pytest.approx(steps)
    assert f"and {steps} steps of 1,000,000 different ones" in str(metric.note)


def test_weights_are_restored_in_place() -> None:
    """After the measurement each weight has its old value at its old address."""
    case = finetune(tiny, lora(dropout=0.0), batch=1, length=8, steps=2, learning_rate=1e-2)
    assert isinstance(case.workload, FinetuneSpec)
    program = training_program(build(case, torch.device("cpu")), case, case.workload)
    trained = {name: part for name, part in program.model.named_parameters() if part.requires_grad}
    before = {name: (part.data_ptr(), part.detach().clone()) for name, part in trained.items()}
    with weights_restored(program.model):
        for _ in range(2):
            program.step()
    for name, part in trained.items():
        assert part.data_ptr() == before[name][0]
        assert torch.equal(part, before[name][1])
    program.step()
    assert not all(torch.equal(part, before[name][1]) for name, part in trained.items())


@pytest.mark.parametrize(
    ("states", "why"),
    [
        ([{"mig_mode": 1}], "MIG gives this process only a part of it"),
        ([{}, {"processes": 3}], "2 other processes used it too"),
    ],
)
def test_energy_shared_with_others_is_not_reported(
    monkeypatch: pytest.MonkeyPatch, states: list[dict[str, int]], why: str
) -> None:
    """On a slice of a GPU, or with other processes on it, a note replaces the metric."""
    _simulate_gpu(monkeypatch, states)
    findings = token_energy(_three_queries(), _GPU, query_s=None, gpu_before={})
    assert findings.metrics == {}
    assert why in findings.notes[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has an energy counter")
def test_without_a_gpu_there_is_no_energy() -> None:
    """A CPU's record has neither metric nor note, and asking NVML is an error."""
    findings = step_energy(Step(), torch.device("cpu"), step_s=None, gpu_before={})
    assert (findings.metrics, findings.notes) == ({}, ())
    with pytest.raises(MeasureError, match="sees no GPU"):
        gpu_energy_mj()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU whose energy could be read")
def test_a_busy_board_takes_more_than_a_resting_one() -> None:
    """Matrix products take more power than waiting, both between 20 W and 1400 W."""
    device = torch.device("cuda", 0)
    left = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)

    def products() -> None:
        for _ in range(100):
            left @ left
        torch.cuda.synchronize(device)

    products()
    busy = energy_of(products, gpu_energy_mj)
    time.sleep(1.0)
    resting = energy_of(lambda: time.sleep(0.05), gpu_energy_mj)
    assert 20.0 < resting.watts < busy.watts < 1400.0
