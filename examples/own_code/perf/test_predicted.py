"""The memory of a training on a GPU, predicted where there is none: `pytest --benchmark --perf-predict all`."""

from __future__ import annotations

from hpc_core import CallableSpec, Case, GiB, Limits, predicted_cases

LARGE = Case(
    id="own-code/train-large",
    scale="full",
    workload=CallableSpec(
        factory="own_code.train:make_step",
        arguments={"batch": 32, "length": 1024, "width": 4096, "layers": 2, "heads": 32},
    ),
    limits=Limits(peak_bytes=40 * GiB),
)


@predicted_cases([LARGE], gpu="H100")
def test_large(case, perf):
    """It fits, and takes no byte, FLOP or kernel more than was accepted."""
    perf(case)
