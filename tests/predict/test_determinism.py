"""The same case gives the same prediction, bit for bit, and leaves nothing behind in its process."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from hpc_core.catalogue import TINY
from hpc_core.record.record import Record
from tests.predict.predicting import predicted

_CASES = {case.id: case for case in TINY}
_FEW = [_CASES[f"tiny/{name}"] for name in ("lora-gc", "qlora-prepare", "generate-nf4", "full-bf16")]
COUNT_SURVIVORS = """
import gc
from hpc_core.predict import shim
shim.load()
from hpc_core.worker.main import run_job
from hpc_core.record.job import Job, Predict
from hpc_core.catalogue import catalogue
from tests.predict.predicting import GPU
gc.disable()  # nothing is freed by chance
for name in ("tiny/qlora", "tiny/generate-nf4"):
    record = run_job(Job(case=catalogue()[name], kind=Predict(gpu=GPU)), lambda event: None)
    assert record.status == "ok", record.failure
    import torch
    from torch._subclasses.fake_tensor import FakeTensor
    things = [thing for thing in gc.get_objects() if issubclass(type(thing), (FakeTensor, torch.nn.Module))]
    print(sum(isinstance(thing, FakeTensor) and thing.dim() > 0 for thing in things), end=" ")
    print(sum(type(thing).__module__.startswith(("transformers.models", "peft", "bitsandbytes")) for thing in things))
"""


def _reproducible(record: Record) -> bytes:
    """The record as JSON without its start time and durations."""
    assert record.failure is None, record.failure
    fields = msgspec.to_builtins(record)
    for name in ("started_at", "phase_s"):
        del fields["circumstances"][name]
    return msgspec.json.encode(fields, order="deterministic")


@pytest.mark.nightly
def test_two_processes_predict_the_same() -> None:
    """A prediction does not depend on the process or on the cases predicted before it."""
    with ThreadPoolExecutor(2) as pool:
        forward, backward = pool.map(predicted, (_FEW, _FEW[::-1]))
    assert [_reproducible(record) for record in forward] == [_reproducible(record) for record in backward[::-1]]


@pytest.mark.nightly
def test_a_process_predicts_the_same_again() -> None:
    """A process that predicts a case twice gives the same record twice."""
    first, second = predicted([_FEW[0], _FEW[0]])
    assert _reproducible(first) == _reproducible(second)


@pytest.mark.slow
def test_no_tensor_and_no_module_outlives_its_prediction() -> None:
    """Of two quantized cases predicted in one process, neither leaves a tensor or a module in a cycle or a library's table."""
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COUNT_SURVIVORS],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.stdout.splitlines() == ["0 0", "0 0"], process.stderr[-2000:]
