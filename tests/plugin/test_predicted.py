"""Predictions of a tiny model in runs with --benchmark. They need no GPU."""

from __future__ import annotations

import pytest

from hpc_core import predicted_cases
from hpc_core.case.errors import PredictError
from hpc_core.catalogue import finetune, tiny

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


def suite(pytester: pytest.Pytester, source: str = SUITE) -> None:
    pytester.makeini("[pytest]\nperf_paths = .\n")
    pytester.makepyfile(test_predicted=source)


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return pytester.runpytest_subprocess("--benchmark", "-p", "no:cacheprovider", *arguments)


def test_a_prediction_is_accepted_and_then_guards_its_bytes(pytester: pytest.Pytester) -> None:
    """Memory that stays alive fails, with the operator that allocated it; a case without a baseline is skipped."""
    suite(pytester)
    accepted = run(pytester, "--perf-predict=short", "--perf-update", "--perf-allow-dirty", "--reason=first")
    accepted.stdout.fnmatch_lines(["*predictions: short*", "created baselines/predicted/tiny/lora.json*"])
    accepted.assert_outcomes(passed=1, deselected=1)

    worse = run(pytester, "--perf-predict=all", "--perf-fault=retained-64mib", "-rs")
    worse.assert_outcomes(failed=1, skipped=1)
    worse.stdout.fnmatch_lines(
        [
            "*tiny/lora peak_bytes:*+64.00 MiB*",
            "*at the peak: other aten.*(+64.00 MiB)*",
            "*Run it again:*test_predicted.py*",
        ]
    )
    worse.stdout.fnmatch_lines(["*no baseline of tiny/full for predicted*"])


@pytest.mark.nightly
def test_a_second_prediction_passes(pytester: pytest.Pytester) -> None:
    """The same case is predicted again in another process and passes under strict. By day, bench/test_predicted.py shows this."""
    suite(pytester)
    run(pytester, "--perf-predict=short", "--perf-update", "--perf-allow-dirty", "--reason=first").assert_outcomes(
        passed=1, deselected=1
    )
    run(pytester, "--case=tiny/lora", "--perf-strict").assert_outcomes(passed=1, deselected=1)


def test_predictions_can_be_switched_off(pytester: pytest.Pytester) -> None:
    """`--perf-predict off` deselects all of them."""
    suite(pytester)
    pytester.runpytest_inprocess("--benchmark", "--perf-predict=off").assert_outcomes(deselected=2)


def test_a_wrong_decorator_is_one_clear_line(pytester: pytest.Pytester) -> None:
    """An unknown or ambiguous GPU, and a short case that is not in the list, are errors that pytest shows at collection."""
    case = finetune(tiny, batch=2, length=64, steps=2)
    with pytest.raises(PredictError, match="No GPU is called 'TPU v9'"):
        predicted_cases([case], gpu="TPU v9")
    with pytest.raises(PredictError, match="'RTX' matches"):
        predicted_cases([case], gpu="RTX")
    suite(
        pytester,
        "from hpc_core import predicted_cases\nfrom hpc_core.catalogue import finetune, tiny\n"
        "@predicted_cases([finetune(tiny)], short=['tiny/lora'])\ndef test_predicted(case, perf): perf(case)\n",
    )
    result = pytester.runpytest_inprocess("--benchmark")
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines(["*names no case of its list: tiny/lora*"])
