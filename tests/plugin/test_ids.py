"""Ids of tests with a step of their own: which tests share one, and which ids stay what they were. Workers are scripted."""

from __future__ import annotations

import pytest

from tests.plugin.scripted_project import Run, scripted_project

pytestmark = pytest.mark.slow

STEP = "perf('scripted:step')"
SUITE = f"""
import pytest, unittest

def test_step(perf):
    {STEP}

class TestDecode:
    def test_step(self, perf):
        {STEP}

    class TestLong:
        def test_step(self, perf):
            {STEP}

class Testdecode:
    def test_step(self, perf):
        {STEP}

class TestPrefill:
    @pytest.mark.parametrize("size", ["A", "a", "b"])
    def test_step(self, perf, size):
        {STEP}
"""


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run pytest in a project whose suite each test writes."""
    return scripted_project(pytester, monkeypatch)


def write(pytester: pytest.Pytester, *paths: str, text: str = f"def test_step(perf):\n    {STEP}\n") -> None:
    """Write the same suite to these files."""
    for name in paths:
        path = pytester.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def ids(pytester: pytest.Pytester) -> set[str]:
    """Return the ids of all baselines."""
    folder = pytester.path / "baselines" / "cpu"
    return {path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.json")}


def test_a_class_belongs_to_the_id(pytester: pytest.Pytester, run: Run) -> None:
    """Tests of one name in a module and its classes are cases of their own; classes and parameters that differ only in case are, too."""
    write(pytester, "bench/test_own.py", text=SUITE)
    assert run("--benchmark", "--perf-update", "--reason=first").ret == 0
    assert ids(pytester) == {
        "test_own/test_step",
        "test_own/testdecode.4f39.test_step",
        "test_own/testdecode.4f39.testlong.test_step",
        "test_own/testdecode.0e06.test_step",
        "test_own/testprefill.test_step-a.b5fb",
        "test_own/testprefill.test_step-a.d6a8",
        "test_own/testprefill.test_step-b",
    }
    assert run("--benchmark", "--perf-strict").ret == 0


def test_an_id_does_not_depend_on_what_runs(pytester: pytest.Pytester, run: Run) -> None:
    """A test that runs alone has the id that it has among the others."""
    write(pytester, "bench/test_own.py", text=SUITE)
    run("--benchmark", "--perf-update", "--reason=first")
    for name in ("test_step", "TestDecode::test_step", "Testdecode::test_step", "TestPrefill::test_step[a]"):
        assert run("--benchmark", "--perf-strict", f"bench/test_own.py::{name}").ret == 0


def test_a_folder_belongs_to_the_id(pytester: pytest.Pytester, run: Run) -> None:
    """Files of one name in the suite's folders, and in two suites, are told apart; a file in the suite's folder keeps its name."""
    write(pytester, "bench/test_own.py", "bench/gpu/test_own.py", "bench/gpu/long/test_own.py", "perf/test_own.py")
    arguments = ("--benchmark", "--import-mode=importlib")
    assert run(*arguments, "--perf-update", "--reason=first").ret == 0
    assert ids(pytester) == {"test_own/test_step", "gpu.test_own/test_step", "gpu.long.test_own/test_step"}
    assert run(*arguments, "--perf-update", "--reason=first", "perf").ret == 0
    assert "perf.test_own/test_step" in ids(pytester)
    (pytester.path / "pyproject.toml").write_text('[tool.pytest.ini_options]\nperf_paths = ["bench", "perf"]\n')
    run(*arguments, "--perf-update", "--reason=first")
    assert {"bench.test_own/test_step", "perf.test_own/test_step"} < ids(pytester)
    for path in ("bench", "perf"):
        assert run(*arguments, "--perf-strict", path).ret == 0


def test_the_value_of_an_option_moves_neither_ids_nor_baselines(
    pytester: pytest.Pytester, run: Run, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Without an ini file pytest takes `--perf-records DIR` for a path and its parent for the root folder; we stay where we were."""
    (pytester.path / "pyproject.toml").unlink()
    write(pytester, "test_own.py")
    elsewhere = tmp_path_factory.mktemp("records")
    run("--benchmark", "test_own.py", "--perf-update", "--reason", "first")
    result = run("--benchmark", "test_own.py", "--perf-records", str(elsewhere))
    result.stdout.fnmatch_lines(["*test_own/test_step *PASS*"])
    assert (pytester.path / "baselines").is_dir()
