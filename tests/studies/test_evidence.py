"""The gate's error rates on stored H100 samples of unchanged and of slowed work."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from bench.studies.error_rates.metric_rates import PROCESSES
from bench.studies.error_rates.rates import ErrorRates, error_rates
from bench.studies.error_rates.samples import Samples, samples_from_json
from bench.studies.error_rates.wall_rates import rates as wall_rates
from hpc_core.case.errors import SpecError
from hpc_core.compare.sequential import Sequential
from hpc_core.gate.intervals import SPREADS
from hpc_core.gate.tolerance import PAIRED_RATIO
from hpc_core.gate.verdict import Verdict, share

STUDIES = Path(__file__).parents[2] / "bench" / "studies"
SUITE_TESTS = 28
"""About the number of tests of busy time in a run of the H100 suite, which share the suite's alpha."""


@pytest.fixture(scope="module")
def samples() -> Samples:
    """Samples of the same code on several machine starts."""
    return samples_from_json((STUDIES / "error_rates" / "aa-h100.json").read_bytes(), "aa-h100.json")


@pytest.fixture(scope="module")
def rates(samples: Samples) -> ErrorRates:
    """The gate's error rates on these samples."""
    return error_rates(samples)


def test_the_samples_are_four_starts_of_four_processes_of_four_cases(samples: Samples) -> None:
    """Each start names its GPU, and each busy metric has a value per process."""
    assert len(samples.starts) == 4
    for start in samples.starts:
        assert start.gpu_uuid.startswith("GPU-")
        assert len(start.cases) == 4
        for metrics in start.cases.values():
            busy = [values for name, values in metrics.items() if samples.metrics[name].noise == "busy"]
            assert busy
            assert {len(values) for values in busy} == {4}


def test_the_suite_gives_no_false_alarm_on_unchanged_work(rates: ErrorRates) -> None:
    """At most 1 in 100 runs of the suite calls unchanged work REGRESSED; exact metrics never do."""
    assert rates.suite is not None
    assert rates.suite <= 0.01
    assert [rate.metric for rate in rates.rates if rate.noise == "exact" and rate.paired and rate.paired.alarms] == []


def test_an_ab_of_three_processes_a_side_detects_one_and_a_half_percent(rates: ErrorRates) -> None:
    """In one session, +1.5 % of busy time is REGRESSED in 95 of 100 A/Bs, for each case and metric."""
    detectable = {
        (rate.case, rate.metric): rate.paired.detects for rate in rates.rates if rate.noise == "busy" and rate.paired
    }
    assert len(detectable) == 5
    assert max(detectable.values()) <= 0.015, detectable


def test_two_percent_of_device_time_is_caught_and_no_change_passes() -> None:
    """Of A/Bs drawn from twenty clean and twenty slowed processes, 95 of 100 are REGRESSED; of clean ones, 95 of 100 PASS."""
    study: dict[str, Any] = json.loads((STUDIES / "detection" / "detection-h100.json").read_bytes())
    clean, slowed = study["clean_busy_s"], study["spinning_busy_s"]
    assert (len(clean), len(slowed)) == (20, 20)
    assert study["spin_s"] == pytest.approx(0.02 * study["unchanged_busy_s"])
    rule = Sequential(share(SUITE_TESTS), PAIRED_RATIO, most_pairs=PROCESSES, spread=SPREADS["train"])
    generator = random.Random(0)
    runs = 1000
    regressed = passed = 0
    for _ in range(runs):
        base, head = _threes(clean, generator), _threes(slowed, generator)
        regressed += rule.check(base, head).verdict is Verdict.REGRESSED
        drawn = generator.sample(clean, 2 * PROCESSES)
        passed += rule.check(drawn[:PROCESSES], drawn[PROCESSES:]).verdict is Verdict.PASS
    assert regressed / runs >= 0.95
    assert passed / runs >= 0.95


def _threes(values: list[float], generator: random.Random) -> list[float]:
    return generator.sample(values, PROCESSES)


@pytest.mark.parametrize("sessions", [1, 5])
def test_wall_time_of_unchanged_work_raises_no_alarm(sessions: int) -> None:
    """In 50 suite runs drawn from the stored processes no time is REGRESSED; a percentage of one run alarms in a fifth of them."""
    values = json.loads((STUDIES / "error_rates" / "wall-two-cores.json").read_text(encoding="utf-8"))
    found = wall_rates(values, sessions, random.Random(7), draws=50)
    assert found.metrics >= 25
    assert found.suite == 0
    assert found.others > 0.2
    assert found.caught["+150 %"] > found.caught["+25 %"]


def test_too_few_samples_are_refused_with_both_numbers() -> None:
    """Rates of five sessions take eighteen processes of a case."""
    with pytest.raises(SpecError, match="take 18 undisturbed processes of a case; the samples have 2"):
        wall_rates({"tiny/lora": {"step_s": [1.0, 1.0], "step_per_canary": [1.0, 1.0]}}, 5, random.Random(7))
