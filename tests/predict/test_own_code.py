"""A user's own steps run on the fake GPU, and what cannot be faked is refused with its name and line."""

from __future__ import annotations

import functools
import os
import runpy
import tempfile
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
    _case("optimizer-first", "optimizer_first"),
    _case("conv1d", "convolves", dimensions=1),
    _case("conv2d", "convolves", dimensions=2),
    _case("scaler", "scales_gradients"),
    _case("no-mask", "trains_with_mask", padded=None),
    _case("full-mask", "trains_with_mask", padded=0),
    _case("padded", "trains_with_mask", padded=4),
    *(_case(f"generate-{new}", "generates", max_new_tokens=new, do_sample=False) for new in (1, 2, 9)),
    _case("sample", "generates", max_new_tokens=2, do_sample=True, top_p=0.9),
    _case("beams", "generates", max_new_tokens=2, num_beams=2),
    _case("loha", "adapts", method="LoHaConfig"),
    _case("lokr", "adapts", method="LoKrConfig"),
    _case("boft", "adapts", method="BOFTConfig", boft_block_size=4),
    _case("vblora", "adapts", method="VBLoRAConfig", vector_length=16, num_vectors=8),
    _case("memory", "asks_the_gpu"),
    _case("known", "reads_known_values"),
    _case("given", "train"),
    _case("found", "picks_its_device"),
    LARGE,
]


@functools.cache
def _records() -> dict[str, Record]:
    with mock.patch.dict(os.environ, PYTHONPATH=str(EXAMPLE)), tempfile.TemporaryDirectory() as folder:
        own_steps.tiny_llama("cpu").save_pretrained(folder)
        loading = [
            _case("loads-auto", "loads", folder=folder, device_map="auto"),
            _case("loads-cuda", "loads", folder=folder, device_map="cuda"),
            _case("loads-nf4", "loads", folder=folder, device_map="cuda", nf4=True),
            _case("trainer", "trains_with_trainer", folder=f"{folder}/trainer"),
        ]
        return {record.case.id: record for record in predicted([*CASES, *loading])}


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


RUNS = (
    *("loads-auto", "loads-cuda", "loads-nf4", "trainer"),
    *("optimizer-first", "conv1d", "conv2d", "scaler", "sample", "memory", "known"),
    *("loha", "lokr", "boft", "vblora"),
)


@pytest.mark.parametrize("name", RUNS)
def test_a_step_that_takes_no_branch_of_data_is_predicted(name: str) -> None:
    """A step that runs on a GPU, and decides only by values that the host made, is predicted. The steps themselves assert more."""
    assert values(_records()[f"own/{name}"])["peak_bytes"] > 0


def test_the_flops_of_a_convolution_are_counted() -> None:
    """A convolution's FLOPs are those of its forward and its weight's gradient: 2 x 4 x 8 x 3 for each of 2 x 14 positions, twice."""
    assert values(_records()["own/conv1d"])["flops"] == 2 * 2 * 4 * 8 * 3 * 2 * 14


def test_a_model_that_transformers_quantizes_takes_less() -> None:
    """`from_pretrained` with NF4 puts packed weights on the fake GPU, as `device_map` says."""
    metrics = {name: values(_records()[f"own/loads-{name}"]) for name in ("auto", "cuda", "nf4")}
    assert metrics["auto"] == metrics["cuda"]
    assert metrics["nf4"]["peak_bytes"] < metrics["cuda"]["peak_bytes"]


def test_a_mask_decides_by_what_it_hides() -> None:
    """A full attention mask takes what no mask takes but its own bytes; one with padding takes other operators."""
    without, full, padded = (values(_records()[f"own/{name}"]) for name in ("no-mask", "full-mask", "padded"))
    assert full["flops"] == without["flops"]
    assert 0 <= full["peak_bytes"] - without["peak_bytes"] <= 4096
    assert padded["operators"] != full["operators"]


def test_generate_makes_all_the_tokens_that_it_may() -> None:
    """`generate` in a step of one's own never ends early: each token costs the same operators."""
    one, two, nine = (values(_records()[f"own/generate-{new}"])["operators"] for new in (1, 2, 9))
    assert nine - two == 7 * (two - one) > 0


def test_a_refusal_names_the_users_line_before_the_librarys() -> None:
    """A library that decides by an unknown value is named after the line of the user that called it."""
    assert f"{own_steps.__file__}:" in _refusal("beams").split(" (inside transformers/generation/utils.py:")[0]


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
