"""A prediction leaves nothing of its model in the process: what is freed later meets another fake GPU, or none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

LEFT = """
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


@pytest.mark.slow
def test_no_tensor_and_no_module_outlives_its_prediction() -> None:
    """Of two quantized cases in one process neither leaves a tensor: not in a cycle, not in a table that a library made."""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LEFT],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.stdout.splitlines() == ["0 0", "0 0"], ran.stderr[-2000:]
