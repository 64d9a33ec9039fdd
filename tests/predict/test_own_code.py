"""A user's own steps run on the fake GPU, and what cannot be faked is refused with its name and line."""

from __future__ import annotations

import functools
import os
import runpy
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from hpc_core.baselines.lookup import find
from hpc_core.case.case import Case
from hpc_core.case.workloads import CallableSpec
from hpc_core.gate.judge import judge
from hpc_core.gate.verdict import Verdict
from hpc_core.record.record import Record
from tests.predict import own_steps
from tests.predict.predicting import predicted, refusal, values

pytestmark = pytest.mark.slow


EXAMPLE = Path(__file__).parents[2] / "examples" / "own_code"


def _case(name: str, factory: str, **arguments: Any) -> Case:
    return Case(
        id=f"own/{name}",
        scale="tiny",
        workload=CallableSpec(factory=f"tests.predict.own_steps:{factory}", arguments=arguments),
    )


REFUSALS = {
    "branch on a tensor": "decides by the value of a tensor",
    "branch on a number": "decides by the value of a tensor",
    "branch on a sum of numbers": "decides by the value of a tensor",
    "best so far": "decides by the value of a tensor",
    "range": "makes an integer of the value of a tensor",
    "number of rows": "makes an integer of the value of a tensor",
    "list": "makes a list of the values of a tensor",
    "numpy": "takes a tensor to NumPy",
    "membership": "looks for a value in a tensor",
    "key of a dict": "uses the value of a tensor as a key",
    "rows of a mask": "the shape or value of aten.nonzero.default depends on data",
    "equal": "the shape or value of aten.equal.default depends on data",
    "raise": "raised IndexError on fake tensors",
}
"""How a step reads a value, and the refusal's message."""
LARGE: Case = runpy.run_path(str(EXAMPLE / "perf" / "test_predicted.py"))["LARGE"]
CASES = [
    *(_case(what.replace(" ", "-"), "reads_values", what=what) for what in REFUSALS),
    _case("cpu", "stays_on_the_cpu"),
    _case("optimizer", "optimizer_first"),
    _case("given", "train"),
    _case("found", "picks_its_device"),
    LARGE,
]


@functools.cache
def _records() -> dict[str, Record]:
    with mock.patch.dict(os.environ, PYTHONPATH=str(EXAMPLE)):
        return {record.case.id: record for record in predicted(CASES)}


def _refusal(name: str) -> str:
    return refusal(_records()[f"own/{name}"])


@pytest.mark.parametrize(("what", "expected"), REFUSALS.items())
def test_a_step_that_depends_on_values_is_refused(what: str, expected: str) -> None:
    """A step that branches on a tensor's value is refused, with what it did and the line of its own file."""
    message = _refusal(what.replace(" ", "-"))
    assert expected in message
    if what != "list":  # the worker calls this method, not a line of the file
        assert f"{own_steps.__file__}:" in message


def test_a_step_that_stays_on_the_cpu_is_refused() -> None:
    """A step without a tensor on the GPU is refused rather than predicted as empty."""
    assert "made no tensor on the GPU" in _refusal("cpu")


def test_an_optimizer_created_before_the_move_is_refused() -> None:
    """An optimizer created before its model moved is refused: its state would be missing silently."""
    assert "The AdamW was created before its model was moved" in _refusal("optimizer")


def test_a_step_finds_the_gpu_either_way() -> None:
    """A step predicts the same whether it takes `device` or asks torch.cuda.is_available()."""
    given, found = (values(_records()[f"own/{name}"]) for name in ("given", "found"))
    assert given == found
    assert {"peak_bytes", "flops", "kernels", "operators", "copies"} <= set(given)
    assert given["copies"] == 20  # the loss goes to the host twice a step: for the log and as the return value


def test_the_example_meets_its_baseline() -> None:
    """The training of 23 GiB that examples/own_code predicts takes exactly the accepted bytes, FLOPs and kernels."""
    record = _records()[LARGE.id]
    assert record.failure is None, record.failure
    judged = judge(record, find(EXAMPLE / "baselines", "predicted", LARGE.id))
    assert judged.verdict is Verdict.PASS, judged.reason
