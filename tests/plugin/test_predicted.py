"""Predictions in a run with --benchmark, told as stories with a tiny model: no GPU, and none needed."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.slow

SUITE = """
    from hpc_core import predicted_cases
    from hpc_core.catalogue import finetune, lora, tiny

    CASES = [finetune(tiny, lora(), batch=2, length=64, steps=2), finetune(tiny, variant="full", batch=2, length=64, steps=2)]

    @predicted_cases(CASES, gpu="RTX 4090", short=["tiny/lora"])
    def test_predicted(case, perf):
        record = perf(case)
        assert "step_s" not in record.metrics
        assert record.circumstances.machine.key == "predicted"
"""
CASES = "from hpc_core.catalogue import finetune, tiny\ncase = finetune(tiny, batch=2, length=64, steps=2)\n"


def suite(pytester: pytest.Pytester, source: str = SUITE) -> None:
    pytester.makeini("[pytest]\nperf_paths = .\n")
    pytester.makepyfile(test_predicted=source)


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return pytester.runpytest_subprocess("--benchmark", "-p", "no:cacheprovider", *arguments)


def test_a_prediction_is_accepted_and_then_guards_its_bytes(pytester: pytest.Pytester) -> None:
    """Accepted once it passes under strict; logits that stay alive are red, with the operator that made them."""
    suite(pytester)
    accepted = run(pytester, "--perf-predict=short", "--perf-update", "--reason=first")
    accepted.stdout.fnmatch_lines(["*predictions: short*", "created baselines/predicted/tiny/lora.json*"])
    accepted.assert_outcomes(passed=1, deselected=1)

    again = run(pytester, "--case=tiny/lora", "--perf-strict")
    again.assert_outcomes(passed=1, deselected=1)

    worse = run(pytester, "--case=tiny/lora", "--perf-fault=retained-64mib")
    worse.assert_outcomes(failed=1, deselected=1)
    worse.stdout.fnmatch_lines(
        [
            "*tiny/lora peak_bytes:*+64.00 MiB*",
            "*at the peak: other aten.*(+64.00 MiB)*",
            "*Run it again:*test_predicted.py*",
        ]
    )


def test_no_baseline_is_a_skip_and_off_is_off(pytester: pytest.Pytester) -> None:
    """Without a baseline a prediction is skipped with the reason; `--perf-predict off` takes none; all takes all."""
    suite(pytester)
    run(pytester, "--perf-predict=off").assert_outcomes(deselected=2)
    everything = run(pytester, "--perf-predict=all", "-rs")
    everything.assert_outcomes(skipped=2)
    everything.stdout.fnmatch_lines(["*no baseline of tiny/lora for predicted*"])


@pytest.mark.parametrize(
    ("decorator", "message"),
    [
        ('predicted_cases([case], gpu="TPU v9")', "*No GPU is called 'TPU v9'. Known GPUs: H100*"),
        ('predicted_cases([case], gpu="RTX")', "*'RTX' matches RTX 4090 and RTX 5090*"),
        ('predicted_cases([case], short=["tiny/lora"])', "*names no case of its list: tiny/lora*"),
    ],
)
def test_a_wrong_decorator_is_one_clear_line(pytester: pytest.Pytester, decorator: str, message: str) -> None:
    """A GPU that nobody knows, two that a name could mean, and a short case that is not there."""
    suite(
        pytester,
        f"from hpc_core import predicted_cases\n{CASES}\n@{decorator}\ndef test_predicted(case, perf): perf(case)\n",
    )
    result = run(pytester)
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines([message])
