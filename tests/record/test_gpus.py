"""A user's name for a GPU finds its entry in the table."""

from __future__ import annotations

import pytest

from hpc_core.case.errors import PredictError
from hpc_core.record.gpus import GPUS, gpu_named


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("H100", "H100 80GB HBM3"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB HBM3"),
        ("h100-pcie", "H100 PCIe"),
        ("A100", "A100-SXM4-80GB"),
        ("a100-80gb", "A100-SXM4-80GB"),
        ("H200", "H200"),
        ("rtx4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 5090", "RTX 5090"),
        ("4090", "RTX 4090"),
        *((name, name) for name in GPUS),
    ],
)
def test_a_common_name_finds_its_gpu(name: str, entry: str) -> None:
    """Vendor, capitals, spaces and hyphens do not matter, and a short name means the common card."""
    assert gpu_named(name).name == entry


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("RTX", "matches RTX 4090 and RTX 5090"),
        ("MI300X", "No GPU is"),
        ("A10", "No GPU is"),
        ("H20", "No GPU is"),
        ("", "No GPU is"),
    ],
)
def test_an_unclear_name_lists_the_gpus(name: str, problem: str) -> None:
    """An ambiguous or unknown name is refused; the error lists every known GPU."""
    with pytest.raises(PredictError, match=problem) as refusal:
        gpu_named(name)
    assert all(known in str(refusal.value) for known in GPUS)
