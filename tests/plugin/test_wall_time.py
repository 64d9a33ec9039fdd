"""Stories of wall time: what only a clock sees fails a test, and its line is named."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.nightly
_CONFTEST = """
from hpc_core.instruments import wall

wall._waited_s = lambda: 0.0  # this machine may be busy: judge what was timed
"""
_STEP = """
import time

import torch
from hpc_core import Limits

weights = torch.ones(8, 8)


def test_step(perf):
    def step():
        out = weights
        for _ in range(100):
            out = out + weights
        time.sleep({sleep_s})

    perf(step{limits})
"""


def _run(pytester: pytest.Pytester, sleep_s: float, *arguments: str, limits: str = "") -> pytest.RunResult:
    (pytester.path / "test_mine.py").write_text(_STEP.format(sleep_s=sleep_s, limits=limits))
    return pytester.runpytest_subprocess("--benchmark", "test_mine.py", "-p", "no:cacheprovider", *arguments)


@pytest.fixture
def accepted(pytester: pytest.Pytester) -> pytest.Pytester:
    """A project whose step was accepted without a sleep."""
    pytester.makeconftest(_CONFTEST)
    _run(pytester, 0.0, "--perf-update", "--reason", "first", "--perf-allow-dirty")
    return pytester


def test_a_sleep_in_a_step_fails_the_test_and_its_line_is_named(accepted: pytest.Pytester) -> None:
    """A sleep of 200 ms in a step of some is REGRESSED by wall time; the cause is the line that sleeps."""
    result = _run(accepted, 0.2)
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*REGRESSED*step_s +*ms, limit +100 %", "*Why: step_s*test_step.<locals>.step*"])
    result.stdout.fnmatch_lines(["*(test_mine.py:15)*"])


def test_a_budget_for_a_step_is_judged(accepted: pytest.Pytester) -> None:
    """An absolute limit holds without a baseline's help."""
    result = _run(accepted, 0.02, limits=", limits=Limits(step_s=0.01)")
    assert result.ret != 0
    result.stdout.fnmatch_lines(["*allowed is at most 10.00 ms*"])
