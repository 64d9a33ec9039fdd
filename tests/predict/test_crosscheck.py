"""A prediction against the same step run for real on CPU tensors, by instruments that the predictor does not use.

Bytes are those of tensor storages: what a model, autograd, checkpointing, LoRA and bitsandbytes keep alive does not depend on the
device. What does is named here, and everything else agrees to the byte.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from hpc_core.case.case import Case
from hpc_core.case.parts import ModelSpec
from hpc_core.case.workloads import CallableSpec, FinetuneSpec
from hpc_core.catalogue import (
    finetune,
    full,
    lora,
    qlora,
    tiny,
)
from hpc_core.record.gpus import gpu_named
from tests.predict.crosscheck import Real, really_run
from tests.predict.predicting import GPU, predicted, values

pytestmark = pytest.mark.slow


def _emulates_bfloat16() -> bool:
    """Return whether products in bfloat16 are slow here. oneDNN has them for AVX-512 and later; elsewhere on x86 torch uses loops of its own."""
    cpu_flags = Path("/proc/cpuinfo").read_text()
    return "avx2" in cpu_flags and "avx512f" not in cpu_flags


_WIDE = ModelSpec(shape="llama-3.2-1b", layers=2)
_SMALL = ModelSpec(shape="smollm2-135m", layers=2)
# On a CPU dropout is a multiplication by a float mask, on a GPU a kernel with a mask of truths: other bytes, so there is none.
_LORA = finetune(_WIDE, lora(dropout=0.0), batch=2, length=32, steps=1)
_QLORA = finetune(_SMALL, qlora(dropout=0.0), scale="full", batch=2, length=32, steps=1)
_MANY_TOKENS = finetune(_SMALL, lora(dropout=0.0), scale="full", batch=2, length=256, steps=1)

BYTES = (
    _LORA,
    _QLORA.vary("qlora-dq", double_quant=True),
    _MANY_TOKENS.vary("lora-gc", checkpointing="non-reentrant"),
    finetune(_SMALL, full, scale="full", batch=2, length=256, steps=1),
)
"""The last two hold more activations than weights."""
_TINY = finetune(tiny, lora(dropout=0.0), batch=2, length=64, steps=1)
OWN = Case(id="own/train", scale="tiny", workload=CallableSpec(factory="tests.predict.own_steps:train"))
"""A step as users write it: tied weights that were moved after they were made, clipped gradients, a loss for the log."""
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
    """The real step and predicted bytes by case."""
    real = really_run(BYTES, count=False)
    foreseen = [int(values(record)["peak_requested_bytes"]) for record in predicted(BYTES)]
    return dict(zip(BYTES, zip(real, foreseen, strict=True), strict=True))


@pytest.mark.skipif(
    _emulates_bfloat16(), reason="a step of full-width layers in bfloat16 takes minutes without AVX-512"
)
@pytest.mark.parametrize("case", BYTES, ids=lambda case: case.id)
def test_live_bytes_are_those_of_a_real_step(case: Case) -> None:
    """The highest live bytes of full-width layers agree to 0.001 %, and but for cuDNN's random seeds to the byte.

    Left out on the side of the GPU: the workspaces of cuBLAS for two threads, which are no tensors.
    """
    step, foreseen = _bytes()[case]
    assert step.crashed == 0
    real = step.peak_bytes
    foreseen -= 2 * gpu_named(GPU).workspace_bytes
    assert abs(foreseen - real) <= 1e-5 * real
    assert 0 <= foreseen - real <= _seeds(case)


def test_live_bytes_of_an_own_step_are_those_of_a_real_one() -> None:
    """They agree to the byte, but for what AdamW leaves on the CPU: a counter for each of 13 parameters, and the one it adds to them."""
    real, foreseen = _counts()[OWN.id]
    assert real.crashed == 0
    workspaces = 2 * gpu_named(GPU).workspace_bytes
    assert foreseen["peak_requested_bytes"] - workspaces == real.peak_bytes - 4 * (13 + 1)


def _seeds(case: Case) -> int:
    """cuDNN's attention keeps the seed and the offset of its dropout for the backward, 8 bytes each, dropout or not."""
    assert case.model is not None
    assert case.model.sizes is not None
    return 16 * case.model.sizes.num_hidden_layers


@functools.cache
def _counts() -> dict[str, tuple[Real, dict[str, float | int]]]:
    """Real and predicted counts by the case's id."""
    real = really_run(COUNTS, count=True)
    foreseen = [values(record) for record in predicted(COUNTS)]
    return dict(zip([case.id for case in COUNTS], zip(real, foreseen, strict=True), strict=True))


@pytest.mark.parametrize("case", COUNTS, ids=lambda case: case.id)
def test_flops_are_those_that_torch_counts(case: Case) -> None:
    """FlopCounterMode over a real step says the same number."""
    real, foreseen = _counts()[case.id]
    assert real.crashed == 0
    assert foreseen["flops"] == real.flops > 0


@pytest.mark.parametrize("case", COUNTS, ids=lambda case: case.id)
def test_operators_are_those_of_a_real_step(case: Case) -> None:
    """As many are dispatched as on the CPU, whose attention has another name."""
    real, foreseen = _counts()[case.id]
    assert real.crashed == 0
    assert foreseen["operators"] == sum(real.operators.values()) - _of_the_counter(case)


def _of_the_counter(case: Case) -> int:
    """What FlopCounterMode dispatches itself: it looks at inputs of modules through views, to follow modules in the backward.

    It does so where an input is a leaf that needs a gradient, as that of a layer which is recomputed: four views, for any depth.
    """
    recomputes = isinstance(case.workload, FinetuneSpec) and case.workload.checkpointing != "off"
    return 4 if recomputes else 0
