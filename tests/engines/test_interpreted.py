"""The kernels for 4-bit weights, by Triton's interpreter: no GPU, but triton."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: extra test")


def test_products_are_the_layers_own() -> None:
    """Every batch and width, constants in float32 and quantized again, biases, a gate, a residual and order by eights: float32's products; other shapes are refused with what to do. And what
    stands between the products of a prefill is torch's.
    """
    from tests.interpreted import BATCHES, BATCHES_QUANTIZED_AGAIN, WIDTHS

    ran = subprocess.run(
        [sys.executable, "-m", "tests.interpreted"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    lines = ran.stdout.splitlines()
    assert len([line for line in lines if line.startswith("prefill")]) == 6
    assert len(lines) == 3 * len(WIDTHS) * (len(BATCHES) + len(BATCHES_QUANTIZED_AGAIN)) + 6 + 2
    assert "a layer here has 96 columns" in lines[-2]
    assert "no cut for a layer of 24 rows" in lines[-1]
