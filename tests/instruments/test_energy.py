"""Joules between two readings of a counter: the arithmetic on counters and clocks that are known, and NVML's own where there is a GPU."""

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
    """A clock and a counter that move by what each step takes; the counter shows only what it had at its last renewal."""

    def __init__(self, step_s: float, watts: float, renewed_s: float = 0.0, began_s: float = 0.0) -> None:
        self.step_s, self.watts, self.renewed_s, self.now_s = step_s, watts, renewed_s, began_s

    def step(self) -> None:
        """Time goes on."""
        self.now_s += self.step_s

    def clock(self) -> float:
        """Seconds."""
        return self.now_s

    def read_mj(self) -> int:
        """Millijoules, from seven kilojoules on."""
        seen = self.now_s if not self.renewed_s else self.now_s // self.renewed_s * self.renewed_s
        return int(seen * self.watts * 1000) + 7_000_000


def test_energy_is_what_the_counter_grew_by() -> None:
    """Steps of 40 ms at 500 W: 51 of them reach two seconds, and each took 20 J."""
    board = Board(0.04, 500.0)
    found = energy_of(board.step, board.read_mj, clock=board.clock)
    assert found.times in (50, 51)  # 50 sums of 0.04 may stay a rounding below 2
    assert found.joules / found.times == pytest.approx(20.0, rel=1e-4)
    assert found.watts == pytest.approx(500.0, rel=1e-4)


@given(
    step_s=st.floats(0.001, 3.0), watts=st.floats(60.0, 700.0), began_s=st.floats(0.0, 10.0), whole=st.integers(1, 7)
)
def test_an_old_reading_errs_by_less_than_is_said(step_s: float, watts: float, began_s: float, whole: int) -> None:
    """However the counter's renewals fall, the power is off by no more than the stated doubt; rounds are whole."""
    board = Board(step_s, watts, RENEWED_S, began_s)
    found = energy_of(board.step, board.read_mj, whole=whole, clock=board.clock)
    assert found.seconds >= LEAST_S
    assert found.times % whole == 0
    assert abs(found.watts / watts - 1) <= found.doubt + 1e-4
    assert found.doubt <= RENEWED_S / LEAST_S


def test_a_counter_that_stands_still_gives_no_number() -> None:
    """Zero joules over two seconds are no measurement, and the message says what was read."""
    board = Board(0.5, 0.0)
    with pytest.raises(MeasureError, match=r"7,000,000 to 7,000,000 mJ over 2\.00 s and 4 repetitions"):
        energy_of(board.step, board.read_mj, clock=board.clock)


@pytest.mark.parametrize(
    ("before", "during", "others"),
    [({}, {}, 0), ({"processes": 0}, {"processes": 1}, 0), ({"processes": 1}, {}, 1), ({}, {"processes": 3}, 2)],
)
def test_company_on_the_gpu_is_counted(before: dict[str, int], during: dict[str, int], others: int) -> None:
    """Whoever was there before us, and whoever is there beside us, takes energy that is not ours."""
    assert other_processes(before, during) == others


_ANSWERS = generate(tiny, batch=2, prompts=3, prompt_length=8, new_tokens=4)
assert isinstance(_ANSWERS.workload, GenerateSpec)
_WORKLOAD = _ANSWERS.workload


_GPU = torch.device("cuda", 0)
_SHORT = metric("query_s", samples=[0.01])


def _board(monkeypatch: pytest.MonkeyPatch, states: list[dict[str, int]]) -> None:
    """Let this machine have a GPU whose NVML counts 100 J a reading and gives these states in turn."""
    readings = iter(range(0, 10**7, 100_000))
    following = iter(states)
    monkeypatch.setattr(energy, "energy_of", functools.partial(energy_of, least_s=0.05))
    monkeypatch.setattr(energy, "gpu_energy_mj", lambda: next(readings))
    monkeypatch.setattr(energy, "gpu_state", lambda: next(following))
    monkeypatch.setattr(energy, "synchronize", lambda _: None)


def _answering() -> GenerateProgram:
    return generate_program(build(_ANSWERS, torch.device("cpu")), _WORKLOAD)


def test_a_tokens_energy_is_the_queries_over_their_new_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each prompt equally often, both rows counted: 100 J over whole rounds of 3 queries of 2 x 4 new tokens."""
    _board(monkeypatch, [{}, {"processes": 1}])
    found = token_energy(_answering(), _GPU, query_s=_SHORT, gpu_before={}).metrics["energy_token_j"]
    queries = 100 / found.value / 8
    assert queries == pytest.approx(round(queries))
    assert round(queries) % 3 == 0
    assert not found.gated
    assert f"{round(queries) * 8:,} new tokens, prefill included; whole board, idle power not subtracted: 100 J" in str(
        found.note
    )


class Step:
    """A product, as a step of the user's own."""

    phases: tuple[str, ...] = ("step",)
    period = 1_000_000

    def step(self, mark: Mark = unmarked) -> None:
        """One product."""
        torch.ones(64, 64) @ torch.ones(64, 64)


def test_a_steps_energy_is_the_boards_over_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 J over however many steps fit; where a round of unlike ones would take too long, the note says that they are some of them."""
    _board(monkeypatch, [{}, {"processes": 1}])
    found = step_energy(Step(), _GPU, step_s=_SHORT, gpu_before={}).metrics["energy_step_j"]
    steps = round(100 / found.value)
    assert 100 / found.value == pytest.approx(steps)
    assert f"and {steps} steps of 1,000,000 unlike ones" in str(found.note)


def test_weights_are_put_back_where_they_were() -> None:
    """How many steps two seconds hold differs from run to run: the weights after them are those before, at their places."""
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
    [([{"mig_mode": 1}], "MIG gives this process a slice"), ([{}, {"processes": 3}], "2 other processes used it too")],
)
def test_energy_that_is_not_this_processes_alone_is_no_number(
    monkeypatch: pytest.MonkeyPatch, states: list[dict[str, int]], why: str
) -> None:
    """The counter is the board's: on a slice of it, or in company, the record has a note in place of the metric."""
    _board(monkeypatch, states)
    found = token_energy(_answering(), _GPU, query_s=None, gpu_before={})
    assert found.metrics == {}
    assert why in found.notes[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has an energy counter")
def test_without_a_gpu_there_is_no_energy() -> None:
    """A CPU's record has neither number nor note, and asking NVML says why."""
    found = step_energy(Step(), torch.device("cpu"), step_s=None, gpu_before={})
    assert (found.metrics, found.notes) == ({}, ())
    with pytest.raises(MeasureError, match="sees no GPU"):
        gpu_energy_mj()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU whose energy could be read")
def test_a_busy_board_takes_more_than_a_resting_one() -> None:
    """Products of 4096 edges take more power than waiting does; both lie between 20 W and twice the board's limit of 700 W."""
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
