"""Other tools read `--benchmark-json`: pytest-benchmark's own `compare`, github-action-benchmark and Bencher.

Each reader here takes the fields that the tool's public source takes, by the same names, and fails where the tool would fail.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpc_core.baselines.reading import read_records
from hpc_core.report.csv import records_csv
from hpc_core.report.entry import entries_of
from tests.plugin.scripted_launcher import SAMPLES
from tests.plugin.scripted_project import Run, scripted_project

pytestmark = pytest.mark.slow

SUITE = """
import pytest

def test_train(perf):
    perf("scripted:step")

@pytest.mark.parametrize("batch", [1, 4])
def test_generate(perf, batch):
    perf("scripted:step", batch=batch)
"""
NAMES = ["bench/test_own.py::test_train", "bench/test_own.py::test_generate[1]", "bench/test_own.py::test_generate[4]"]


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run pytest in a project with three cases, each with the same samples."""
    return scripted_project(pytester, monkeypatch, {"test_own.py": SUITE})


@pytest.fixture
def report(pytester: pytest.Pytester, run: Run) -> Path:
    """The file of one run."""
    assert run("--benchmark", "--benchmark-json=one.json").ret == 0
    return pytester.path / "one.json"


def _as_github_action_benchmark(text: str) -> list[dict[str, Any]]:
    """`extractPytestResult` in src/extract.ts of benchmark-action/github-action-benchmark; it alerts on `value`."""
    return [
        {
            "name": bench["fullname"],
            "value": bench["stats"]["ops"],
            "unit": "iter/sec",
            "range": f"stddev: {bench['stats']['stddev']}",
            "extra": f"mean: {bench['stats']['mean']} sec\nrounds: {bench['stats']['rounds']}",
        }
        for bench in json.loads(text)["benchmarks"]
    ]


def _as_bencher(text: str, average: str) -> dict[str, tuple[float, float, float]]:
    """`adapters/python/pytest.rs` of bencherdev/bencher: seconds to nanoseconds, with the spread that belongs to the average."""
    content = json.loads(text)
    assert isinstance(content["machine_info"], dict)
    assert isinstance(content["commit_info"], dict)
    spread = {"median": "iqr", "mean": "stddev"}[average]
    statistics_of = {}
    for bench in content["benchmarks"]:
        value, spread_ns = (1e9 * float(bench["stats"][name]) for name in (average, spread))
        statistics_of[bench["fullname"]] = (value - spread_ns, value, value + spread_ns)
    return statistics_of


def test_github_action_benchmark_reads_our_samples(report: Path) -> None:
    """Its value is one divided by the mean of our samples, with their spread and rounds."""
    read = _as_github_action_benchmark(report.read_text())
    assert [each["name"] for each in read] == NAMES
    mean = statistics.fmean(SAMPLES)
    for each in read:
        assert each["value"] == pytest.approx(1 / mean, rel=1e-12)
        assert each["range"] == f"stddev: {statistics.stdev(SAMPLES)}"
        assert each["extra"] == f"mean: {mean} sec\nrounds: {len(SAMPLES)}"


def test_bencher_reads_our_samples(report: Path) -> None:
    """It takes the median with the interquartile range, or the mean with the standard deviation, in nanoseconds."""
    spread = 1e9 * statistics.stdev(SAMPLES)
    by_mean, by_median = (_as_bencher(report.read_text(), average) for average in ("mean", "median"))
    assert list(by_mean) == list(by_median) == NAMES
    for name in NAMES:
        assert by_mean[name] == pytest.approx((5e8 - spread, 5e8, 5e8 + spread))
        low, median, high = by_median[name]
        assert median == pytest.approx(1e9 * statistics.median(SAMPLES))
        assert low < median < high


def test_our_own_report_reads_it(report: Path) -> None:
    """`hpc-core report` needs only this file, which has each complete record."""
    records = read_records([report]).records
    assert sorted(record.case.id for record in records) == sorted(
        each["extra_info"]["record"]["case"] for each in _benchmarks(report)
    )
    assert {record.wall_samples for record in records} == {SAMPLES}
    entries = entries_of(records)
    assert len(list(csv.DictReader(io.StringIO(records_csv(entries))))) == sum(
        len(record.metrics) for record in records
    )


def _benchmarks(report: Path) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads(report.read_text())["benchmarks"]
    return entries


def test_compare_reads_two_runs(pytester: pytest.Pytester, run: Run, report: Path) -> None:
    """`pytest-benchmark compare` shows each case of two runs, with the statistics of our samples."""
    assert run("--benchmark", "--benchmark-json=two.json").ret == 0
    files = [report.name, "two.json"]
    command = [sys.executable, "-m", "pytest_benchmark", "compare", *files, "--group-by=fullname", "--csv=out.csv"]
    subprocess.run(command, capture_output=True, timeout=60, check=True)
    with (pytester.path / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["name"] for row in rows) == sorted(NAMES * len(files))
    for row in rows:
        reported = tuple(float(row[name]) for name in ("min", "max", "mean", "median", "rounds"))
        expected = (min(SAMPLES), max(SAMPLES), statistics.fmean(SAMPLES), statistics.median(SAMPLES), len(SAMPLES))
        assert reported == pytest.approx(expected)
        assert float(row["ops"]) == pytest.approx(1 / statistics.fmean(SAMPLES))
