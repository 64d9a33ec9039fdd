"""A user's name for a GPU finds its entry in the table."""

from __future__ import annotations

import pytest

from hpc_core.case.errors import PredictError
from hpc_core.record.gpus import GPUS, gpu_named, with_memory


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
        ("T4", "Tesla T4"),
        ("l40s", "L40S"),
        ("a10g", "A10G"),
        ("A100 40GB", "A100-SXM4-40GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe"),
        ("3090", "RTX 3090"),
        ("B200", "B200"),
        ("AMD Instinct MI300X", "MI300X"),
        *((name, name) for name in GPUS),
    ],
)
def test_a_common_name_finds_its_gpu(name: str, entry: str) -> None:
    """Vendor, capitals, spaces and hyphens do not matter, and a short name means the common card."""
    assert gpu_named(name).name == entry


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("RTX", "matches RTX 3090 and RTX 4090 and RTX 5090"),
        ("MI250X", "No GPU is"),
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


def test_a_card_of_another_size_follows_the_same_rules() -> None:
    """Only its memory and its name differ; its own size changes nothing."""
    card = gpu_named("RTX 4090")
    other = with_memory(card, 48 * 2**30)
    assert (other.name, other.memory_bytes) == ("RTX 4090 with 48.00 GiB", 48 * 2**30)
    assert (other.capability, other.workspace_bytes) == (card.capability, card.workspace_bytes)
    assert with_memory(card, None) is with_memory(card, card.memory_bytes) is card


def test_workspaces_follow_the_generation() -> None:
    """32 MiB on Hopper and Blackwell, 128 MiB through ROCm, 8.125 MiB elsewhere."""
    sizes = {name: gpu.workspace_bytes / 2**20 for name, gpu in GPUS.items()}
    assert sizes["B200"] == sizes["H200"] == sizes["RTX 5090"] == 32
    assert sizes["MI300X"] == 128
    assert sizes["Tesla T4"] == sizes["A10G"] == sizes["L4"] == 8.125
