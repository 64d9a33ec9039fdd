"""`perf(…, judge=False)`: a test that relies on its own assertions. Workers are scripted."""

from __future__ import annotations

import pytest

from tests.plugin.scripted_project import Run, scripted_project

pytestmark = pytest.mark.slow

SUITE = """
from hpc_core import GiB, Limits

def test_sound(perf):
    assert perf("scripted:step", peak=GiB, judge=False).metrics["peak_bytes"].value == GiB

def test_asserts(perf):
    assert perf("scripted:step", peak=GiB, judge=False).metrics["peak_bytes"].value < GiB

def test_invalid(perf):
    perf("scripted:invalid", judge=False)

def test_crash(perf):
    perf("scripted:crash", judge=False)

def test_limited(perf):
    perf("scripted:step", judge=False, limits=Limits(peak_bytes=GiB))
"""


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run pytest in a project of unjudged tests."""
    return scripted_project(pytester, monkeypatch, {"test_own.py": SUITE})


def test_its_assertions_decide(pytester: pytest.Pytester, run: Run) -> None:
    """It passes without a baseline, even under strict; its own assertion, a broken or invalid run, or ignored limits fail it."""
    result = run("--benchmark", "--perf-strict", "--benchmark-json=out.json")
    result.assert_outcomes(passed=1, failed=4)
    result.stdout.fnmatch_lines([
        "*assert 1073741824 < 1073741824",
        "invalid: It ran without the quantization that was asked for.",
        "crash in build: it went wrong.",
        "perf(judge=False) ignores limits=. Drop one of the two.",
        "test_own/test_sound *OK*",
    ])  # fmt: skip
    assert (pytester.path / "out.json").exists()


def test_nothing_is_accepted(pytester: pytest.Pytester, run: Run) -> None:
    """--perf-update writes no baseline of an unjudged test."""
    result = run("--benchmark", "--case=test_own/test_sound", "--perf-update", "--reason=all of them")
    result.assert_outcomes(passed=1, deselected=4)
    assert not (pytester.path / "baselines").exists()


def test_properties_of_a_test_reach_junit(pytester: pytest.Pytester, run: Run) -> None:
    """A test may record properties, which reach JUnit's report without a warning."""
    (pytester.path / "bench" / "test_own.py").write_text(
        "def test_noted(perf, request):\n    perf('scripted:step', judge=False)\n"
        "    request.node.user_properties.append(('seen.busy_s', 0.25))\n"
    )
    assert run("--benchmark", "--junitxml=junit.xml").ret == 0
    assert '<property name="seen.busy_s" value="0.25" />' in (pytester.path / "junit.xml").read_text()
