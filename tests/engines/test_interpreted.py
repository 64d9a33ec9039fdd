"""Our Triton kernels on a CPU, by Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: extra test")


def test_kernels_give_what_torchs_operators_give() -> None:
    """4-bit products of every kind, what stands between the products of a prefill, and whole steps; layers that do not fit are refused."""
    from tests.engines.interpreted import SHAPES

    ran = subprocess.run(
        [sys.executable, "-m", "tests.engines.interpreted"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    lines = ran.stdout.splitlines()
    assert len(lines) == 3 * len(SHAPES) + 6 + 2 + 2
    assert "a layer here has 96 columns" in lines[-2]
    assert "no block size for a layer of 24 rows" in lines[-1]
