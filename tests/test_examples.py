"""The project in examples/own_code does what its README says.

Its prediction is tested in tests/predict/test_own_code.py, and examples/trainer in tests/integrations/test_trainer.py.
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
    """Run pytest in the project's folder, on a machine without a GPU."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "--benchmark", "-p", "no:cacheprovider", "-rs", *arguments]
    return subprocess.run(command, cwd=OWN, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.nightly
def test_own_code_meets_its_baselines() -> None:
    """Three steps pass strictly, with relative and absolute limits among them, and the GPU's step is left out."""
    process = _pytest("--perf-strict")
    assert process.returncode == 0, process.stdout + process.stderr
    assert "3 passed, 2 deselected" in process.stdout


def test_the_suite_starts_without_the_packages_of_the_tests() -> None:
    """`pytest --benchmark` in a clone needs no more than `pip install '.[all]'` brings."""
    options = ["--benchmark", "--collect-only", "-q", "--case", "tiny/lora", "-p", "no:hypothesispytest"]
    code = (
        "import importlib.util, sys, pytest\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'hypothesis' else find(name, *rest)\n"
        f"sys.exit(pytest.main({options}) or 'hypothesis' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "test_finetune[tiny/lora]" in process.stdout
