"""hpc-core next to other suites: their fixtures and options are theirs, and their tests run as without hpc-core."""

from __future__ import annotations

import pytest

from tests.plugin.scripted_project import Run, scripted_project

pytestmark = pytest.mark.slow

STRANGER = """
import pytest

@pytest.fixture
def perf():
    return 3

@pytest.fixture
def perf_session(perf):
    return perf + 1

def test_fixture(perf, perf_session):
    assert (perf, perf_session) == (3, 4)

@pytest.mark.parametrize("perf", [1, 2])
def test_parameter(perf):
    assert perf in (1, 2)

class TestOfAClass:
    @pytest.fixture
    def perf(self):
        return "of the class"

    def test_it(self, perf):
        assert perf == "of the class"
"""
OURS = """
import pytest

@pytest.fixture
def perf(perf):
    return perf

def test_extended(perf):
    perf("scripted:step")
"""


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run pytest in a project whose suite each test writes."""
    return scripted_project(pytester, monkeypatch)


def test_a_strangers_fixture_called_perf_is_theirs(pytester: pytest.Pytester, run: Run) -> None:
    """A stranger's fixtures and parameters called `perf` run as without hpc-core, even with --benchmark."""
    pytester.makepyfile(test_stranger=STRANGER)
    run().assert_outcomes(passed=4)
    run("--benchmark", ".").assert_outcomes(passed=4)


def test_a_fixture_that_extends_ours_is_ours(pytester: pytest.Pytester, run: Run) -> None:
    """A fixture `perf` that requests `perf` extends ours, and its tests are cases."""
    pytester.makepyfile(test_extending=OURS)
    run().assert_outcomes(skipped=1)
    result = run("--benchmark", ".")
    result.stdout.fnmatch_lines(["test_extending/test_extended *NO_BASELINE*"])


def test_a_fixture_requested_at_run_time(pytester: pytest.Pytester, run: Run) -> None:
    """`getfixturevalue("perf")` skips without --benchmark; with it, one line says how to write the test."""
    pytester.makepyfile(test_late="def test_late(request):\n    request.getfixturevalue('perf')('scripted:step')\n")
    run().assert_outcomes(skipped=1)
    result = run("--benchmark", ".")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*make perf an argument of the test*"])


CODSPEED = """
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

class Theirs:
    __class__ = BenchmarkFixture

@pytest.fixture
def benchmark():
    return Theirs()
"""


def test_another_plugins_benchmark_gets_nothing(pytester: pytest.Pytester, run: Run) -> None:
    """A case is judged as usual where pytest-codspeed replaces pytest-benchmark's `benchmark`."""
    pytester.makepyfile(conftest=CODSPEED, test_case="def test_case(perf):\n    perf('scripted:step')\n")
    run("--benchmark", "--perf-update", "--reason=first", ".").assert_outcomes(passed=1)
    assert run("--benchmark", "--perf-strict", ".").ret == 0


OPTIONS = """
def pytest_addoption(parser):
    for name in ("--benchmark", "--case", "--cases", "--reason"):
        parser.addoption(name, action="append", nargs="?", const=True)
"""
READS = """
def test_theirs(request):
    assert request.config.getoption("benchmark") == [True]
    assert request.config.getoption("case") == ["3"]
"""


def test_a_strangers_options_are_theirs(pytester: pytest.Pytester, run: Run) -> None:
    """Options that a conftest.py defines are its own; only --perf-* are ours there."""
    pytester.makepyfile(test_reads=READS)
    initial = pytester.makeconftest(OPTIONS)
    run("--benchmark", "--case=3", "test_reads.py").assert_outcomes(passed=1)
    (pytester.path / "bench" / "test_own.py").write_text("def test_own(perf):\n    perf('scripted:step')\n")
    ours = run("--perf-benchmark", "--perf-case=*/test_own", "-rs")
    ours.assert_outcomes(skipped=1)
    strict = run("--perf-benchmark", "--perf-strict", "--case", "test_own/test_own")
    strict.stdout.fnmatch_lines(
        ["*pytest --perf-benchmark --perf-case 'test_own/test_own' --perf-update --perf-reason \"…\""]
    )
    initial.rename(pytester.path / "bench" / "conftest.py")
    run("--benchmark", "--case=*/test_own").assert_outcomes(skipped=1)


def test_a_plugins_options_are_theirs(pytester: pytest.Pytester, run: Run) -> None:
    """Options that another plugin defines are its own, in whichever order pytest loads the two."""
    pytester.makepyfile(test_reads=READS, stranger=OPTIONS)
    pytester.syspathinsert()
    run("-p", "stranger", "--benchmark", "--case", "3", "test_reads.py").assert_outcomes(passed=1)


def test_a_strangers_unregistered_marker_is_seen(pytester: pytest.Pytester) -> None:
    """Under --strict-markers a marker that the project does not register is an error, also if it is called like ours were."""
    names = ("gpu", "benchmark")
    for name in names:
        pytester.makepyfile(**{f"test_{name}": f"import pytest\n\n@pytest.mark.{name}\ndef test_it():\n    pass\n"})
    # A process of its own: pytest remembers the markers of the run around it.
    result = pytester.runpytest_subprocess("--strict-markers", "-p", "no:benchmark")
    assert result.ret == pytest.ExitCode.INTERRUPTED
    for name in names:
        result.stdout.fnmatch_lines_random([f"*'{name}' not found in `markers` configuration option*"])


def test_our_markers_are_registered(pytester: pytest.Pytester, run: Run) -> None:
    """`perf_cases` works under --strict-markers, without --benchmark too."""
    pytester.makepyfile(
        "from hpc_core import perf_cases\nfrom hpc_core.catalogue import ALL\n\n"
        "@perf_cases(ALL)\ndef test_all(case, perf):\n    perf(case)\n"
    )
    assert run("--strict-markers").ret == 0
