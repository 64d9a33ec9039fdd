"""A prediction equals the same step run on CPU tensors, measured by instruments that the predictor does not use.

The bytes are those of tensor storages. What a model, autograd, checkpointing, LoRA and bitsandbytes keep alive does not depend on
the device; the exceptions are named here, and everything else agrees to the byte.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from hpc_core.case.case import Case
from hpc_core.case.parts import ModelSpec
from hpc_core.case.workloads import CallableSpec, FinetuneSpec
from hpc_core.catalogue import finetune, full, lora, qlora, tiny
from hpc_core.record.gpus import gpu_named
from tests.predict.crosscheck import Real, run_for_real
from tests.predict.predicting import GPU, predicted, values

pytestmark = pytest.mark.slow


def _emulates_bfloat16() -> bool:
    """Return whether this CPU multiplies bfloat16 slowly. oneDNN supports it from AVX-512 on; elsewhere on x86 torch uses loops of its own."""
    cpu_flags = Path("/proc/cpuinfo").read_text()
    return "avx2" in cpu_flags and "avx512f" not in cpu_flags


_WIDE = ModelSpec(shape="llama-3.2-1b", layers=2)
_SMALL = ModelSpec(shape="smollm2-135m", layers=2)
# Dropout takes other bytes on a CPU (a float mask) than on a GPU (a boolean mask), so these cases have none.
_LORA = finetune(_WIDE, lora(dropout=0.0), batch=2, length=32, steps=1)
_QLORA = finetune(_SMALL, qlora(dropout=0.0), scale="full", batch=2, length=32, steps=1)
_MANY_TOKENS = finetune(_SMALL, lora(dropout=0.0), scale="full", batch=2, length=256, steps=1)

BYTES = (
    _LORA,
    _QLORA.vary("qlora-dq", double_quant=True),
    _MANY_TOKENS.vary("lora-gc", checkpointing="non-reentrant"),
    finetune(_SMALL, full, scale="full", batch=2, length=256, steps=1),
)
"""The last two have more bytes of activations than of weights."""
_TINY = finetune(tiny, lora(dropout=0.0), batch=2, length=64, steps=1)
OWN = Case(id="own/train", scale="tiny", workload=CallableSpec(factory="tests.predict.own_steps:train"))
"""A step as users write it: tied weights moved after construction, clipped gradients, a logged loss."""
COUNTS = (
    OWN,
    finetune(tiny, full, batch=2, length=64, steps=1),
    _TINY,
    _TINY.vary("lora-eager", attention="eager"),
    _TINY.vary("lora-gc", checkpointing="non-reentrant"),
    finetune(tiny, qlora(dropout=0.0, double_quant=True), variant="qlora-dq", batch=2, length=64, steps=1),
)


@functools.cache
def _bytes() -> dict[Case, tuple[Real, int]]:
    """The real step and the predicted bytes of each case."""
    real = run_for_real(BYTES, count=False)
    predicted_bytes = [int(values(record)["peak_requested_bytes"]) for record in predicted(BYTES)]
    return dict(zip(BYTES, zip(real, predicted_bytes, strict=True), strict=True))


@pytest.mark.skipif(
    _emulates_bfloat16(), reason="a step of full-width layers in bfloat16 takes minutes without AVX-512"
)
@pytest.mark.parametrize("case", BYTES, ids=lambda case: case.id)
def test_live_bytes_equal_those_of_a_real_step(case: Case) -> None:
    """The peak of live bytes of full-width layers agrees to 0.001 %, and to the byte but for cuDNN's random seeds.

    Not compared: cuBLAS's workspaces for two threads on the GPU, which are not tensors.
    """
    step, predicted_bytes = _bytes()[case]
    assert step.crashed == 0
    real = step.peak_bytes
    predicted_bytes -= 2 * gpu_named(GPU).workspace_bytes
    assert abs(predicted_bytes - real) <= 1e-5 * real
    assert 0 <= predicted_bytes - real <= _seeds(case)


def test_live_bytes_of_an_own_step_equal_those_of_a_real_one() -> None:
    """They agree to the byte, but for AdamW's counters on the CPU: one for each of 13 parameters, and the one it adds."""
    real, prediction = _counts()[OWN.id]
    assert real.crashed == 0
    workspaces = 2 * gpu_named(GPU).workspace_bytes
    assert prediction["peak_requested_bytes"] - workspaces == real.peak_bytes - 4 * (13 + 1)


def _seeds(case: Case) -> int:
    """The bytes of the seed and the offset that cuDNN's attention keeps for the backward, 8 each per layer."""
    assert case.model is not None
    assert case.model.sizes is not None
    return 16 * case.model.sizes.num_hidden_layers


@functools.cache
def _counts() -> dict[str, tuple[Real, dict[str, float | int]]]:
    """The real and the predicted counts, by the case's id."""
    real = run_for_real(COUNTS, count=True)
    prediction = [values(record) for record in predicted(COUNTS)]
    return dict(zip([case.id for case in COUNTS], zip(real, prediction, strict=True), strict=True))


@pytest.mark.parametrize("case", COUNTS, ids=lambda case: case.id)
def test_flops_equal_those_that_torch_counts(case: Case) -> None:
    """The FLOPs equal those that FlopCounterMode counts in a real step."""
    real, prediction = _counts()[case.id]
    assert real.crashed == 0
    assert prediction["flops"] == real.flops > 0


@pytest.mark.parametrize("case", COUNTS, ids=lambda case: case.id)
def test_operators_equal_those_of_a_real_step(case: Case) -> None:
    """As many operators are dispatched as in a real step."""
    real, prediction = _counts()[case.id]
    assert real.crashed == 0
    assert prediction["operators"] == sum(real.operators.values()) - _dispatched_by_the_counter(case)


def _dispatched_by_the_counter(case: Case) -> int:
    """The operators that FlopCounterMode dispatches itself to follow modules in the backward.

    It takes four views, at any depth, where a module's input is a leaf that needs a gradient, as in a recomputed layer.
    """
    recomputes = isinstance(case.workload, FinetuneSpec) and case.workload.checkpointing != "off"
    return 4 if recomputes else 0
