"""Our Triton kernels on a CPU, by Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: extra test")


def test_kernels_give_what_torchs_operators_give() -> None:
    """Kernels give the results of torch's operators, and refuse layers that do not fit."""
    from tests.engines.interpreted import SHAPES

    result = subprocess.run(
        [sys.executable, "-m", "tests.engines.interpreted"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 3 * len(SHAPES) + 6 + 2 + 2
    assert "a layer here has 96 columns" in lines[-2]
    assert "no block size for a layer of 24 rows" in lines[-1]
