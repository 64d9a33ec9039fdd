"""Tests that judge a whole session: which records they get, when they run, what they print. Workers are scripted."""

from __future__ import annotations

import pytest

from tests.plugin.scripted_project import Run, scripted_project

pytestmark = pytest.mark.slow

SUITE = """
import pytest

def test_step(perf):
    perf("scripted:step", peak=2**30)

def test_together(perf_session):
    [record] = perf_session.records.values()
    perf_session.show("all of it", f"one record, {record.metrics['peak_bytes'].value:,} bytes")
"""


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run pytest in a project whose suite is a file that pytest collects only when it is named."""
    return scripted_project(pytester, monkeypatch, {"together.py": SUITE, "test_nothing.py": ""})


def test_a_test_of_the_session_sees_its_records_and_prints_below_the_table(run: Run) -> None:
    """Its section comes after the table of cases and shows what the test computed from the records."""
    result = run("--benchmark", "bench/together.py")
    result.assert_outcomes(skipped=1, passed=1)
    result.stdout.fnmatch_lines(["*= hpc-core =*", "*= all of it =*", "one record, 1,073,741,824 bytes"])


def test_it_takes_part_only_when_named(run: Run) -> None:
    """Without --benchmark it is skipped, with --case for other cases deselected, and without its name not collected."""
    result = run("-rs", "bench/together.py")
    result.assert_outcomes(skipped=2)
    result.stdout.fnmatch_lines(["*needs --benchmark*"])
    run("--benchmark", "bench/together.py", "--case", "together/test_step").assert_outcomes(skipped=1, deselected=1)
    assert run("--benchmark").ret == pytest.ExitCode.NO_TESTS_COLLECTED


def test_the_command_names_a_file_that_must_be_named(run: Run) -> None:
    """The printed command includes a file that pytest only collects when it is named."""
    result = run("--benchmark", "bench/together.py", "--perf-strict")
    result.stdout.fnmatch_lines(["*pytest --benchmark bench/together.py --case 'together/test_step'*"])


def test_the_suites_false_alarms_are_divided_and_reported(run: Run, pytester: pytest.Pytester) -> None:
    """Each of two cases with busy time gets half of the suite's alpha, and the end of the run shows the sum."""
    (pytester.path / "bench" / "test_busy.py").write_text("""
def test_one(perf):
    perf("scripted:step", busy=0.2)

def test_two(perf):
    perf("scripted:step", busy=0.1)
""")
    line = "expected false alarms in this run: 0.01 (2 tests of time and energy)"
    run("--benchmark", "--perf-update", "--reason", "r").assert_outcomes(passed=2)
    both = run("--benchmark")
    both.assert_outcomes(passed=2)
    assert line in both.outlines
    extra = run("--benchmark", "--case", "test_busy/test_one")
    assert line.replace("2 tests", "1 test") in extra.outlines
