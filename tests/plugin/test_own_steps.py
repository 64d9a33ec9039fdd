"""Stories of steps of the user's own: broken code does not pass, whether or not it has a baseline."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.slow


def _run(pytester: pytest.Pytester, text: str, *arguments: str) -> pytest.RunResult:
    (pytester.path / "test_mine.py").write_text(text)
    return pytester.runpytest_subprocess("--benchmark", "test_mine.py", "-p", "no:cacheprovider", *arguments)


def _accept(pytester: pytest.Pytester, text: str) -> None:
    result = _run(pytester, text, "--perf-update", "--reason", "first", "--perf-allow-dirty")
    result.assert_outcomes(passed=1)


_COMPILED = """
import itertools

import torch
from hpc_core import Limits


def test_step(perf):
    weights = torch.ones(64, requires_grad=True)
    rows = itertools.count(2)

    @torch.compile(backend="eager", dynamic=False)
    def forward(x):
        return (x * weights).sum()

    def step():
        forward(torch.ones({rows}, 64)).backward()
        weights.grad = None

    perf(step{limits})
"""


def test_recompilation_at_each_call_leads_the_cause_with_its_guard(pytester: pytest.Pytester) -> None:
    """Steps of one shape compile once; steps that differ compile again and again, which a CPU judges too."""
    _accept(pytester, _COMPILED.format(rows="2", limits=""))
    result = _run(pytester, _COMPILED.format(rows="next(rows)", limits=""))
    assert result.ret == 1
    result.stdout.fnmatch_lines([
        "Why: recompilations +8: forward (test_mine.py:12): tensor 'x' size mismatch at index 0. expected 2, actual 3*",
        "*test_mine/test_step recompilations: 0 → 8 (+8), limit equal",
    ])  # fmt: skip


def test_recompilations_may_be_limited_to_none(pytester: pytest.Pytester) -> None:
    """0 is the natural limit of such a count, and it holds without a baseline."""
    result = _run(pytester, _COMPILED.format(rows="next(rows)", limits=", limits=Limits(recompilations=0)"))
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*recompilations is 8, allowed is at most 0 (+8): forward (test_mine.py:12): *"])


_CHECKPOINTED = """
import torch
from torch.utils.checkpoint import checkpoint


def test_step(perf):
    torch.manual_seed(0)
    base, adapter, head = (torch.nn.Linear(64, 64) for _ in range(3))
    base.requires_grad_(False)
    optimizer = torch.optim.AdamW([*adapter.parameters(), *head.parameters()])
    rows = torch.randn(16, 64)
    block = torch.nn.Sequential(base, adapter, torch.nn.Tanh())

    def step():
        head({block}).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    perf(step)
"""


def test_checkpointing_that_loses_gradients_is_no_improvement(pytester: pytest.Pytester) -> None:
    """Reentrant checkpointing of frozen inputs does less, because the adapter gets no gradient. It is INVALID, not IMPROVED."""
    _accept(pytester, _CHECKPOINTED.format(block="block(rows)"))
    result = _run(pytester, _CHECKPOINTED.format(block="checkpoint(block, rows, use_reentrant=True)"))
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        ["*invalid: gradients: asked for '4 of 4 reached', saw '2 of 4 reached; 1.weight has none'.*"]
    )
    result.stdout.no_fnmatch_line("*IMPROVED*")


_KEEPING = """
import torch


def test_step(perf):
    kept, w = [], torch.ones(64, 1024)

    def step():
        kept.append(w * 2)

    perf(step)
"""


def test_memory_that_grows_is_invalid_at_the_first_run(pytester: pytest.Pytester) -> None:
    """How much a step leaves behind, what it is, and the line that made it."""
    result = _run(pytester, _KEEPING)
    assert result.ret == 1
    found = " ".join(str(result.stdout).split())
    assert "memory grows 256.00 KiB a step, held float32[64, 1024] made in test_mine.py:9." in found
