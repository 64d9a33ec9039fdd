"""The project in examples/own_code does what its README says: run as its users run it, so that it cannot rot.

Its prediction is in test_predict_own_code, examples/trainer in test_integrations_trainer: each where what it needs is loaded anyway.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
OWN = ROOT / "examples" / "own_code"


def _pytest(*arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest in the folder of the project, on a machine without a GPU."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "--benchmark", "-p", "no:cacheprovider", "-rs", *arguments]
    return subprocess.run(command, cwd=OWN, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_the_project_of_own_code_meets_its_baselines() -> None:
    """`pytest --benchmark --perf-strict` in its folder: three steps pass, relative and absolute limits among them; the GPU's is skipped."""
    ran = _pytest("--perf-strict")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "3 passed, 1 skipped, 1 deselected" in ran.stdout
    assert "needs a CUDA GPU: none is visible" in ran.stdout
