"""Other plugins beside ours, installed by pip for this test: they work, a regression stays red, and pytest-benchmark's own suite passes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.nightly]

ROOT = Path(__file__).parents[2]
PLUGINS = (
    "pytest-codspeed==5.0.4",
    "pytest-cov==7.1.0",
    "coverage==7.17.5",
    "pytest-memray==1.11.0",
    "memray==1.20.0",
    "pytest-randomly==5.1.0",
    "pytest-rerunfailures==16.7",
    "pytest-timeout==2.4.0",
)
OWN_SUITE = "pytest-benchmark==5.3.1"
CONFTEST = """
from hpc_core.plugin import runner
from tests.plugin.scripted_launcher import ScriptedLauncher

runner.Launcher = ScriptedLauncher
"""
SUITE = """
from hpc_core import Limits

def test_green(perf):
    perf("scripted:step", limits=Limits(peak_bytes=2**31))

def test_red(perf):
    perf("scripted:step", peak=2**31, limits=Limits(peak_bytes=2**30))
"""


def pip(*arguments: str) -> None:
    """Run pip, or skip the test where it cannot get what it needs."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if ran.returncode:
        pytest.skip(f"pip {arguments[0]} failed, as it does without a network: {ran.stderr.strip()[-300:]}")


def run(here: Path, paths: list[Path], *arguments: str, seconds: int = 120) -> subprocess.CompletedProcess[str]:
    """Run pytest in a folder, with these folders first on Python's path."""
    path = os.pathsep.join(map(str, [*paths, ROOT]))
    environment = os.environ | {"PYTHONPATH": path, "COLUMNS": "80", "HPC_CORE_COMMIT": "0123abc"}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        cwd=here, env=environment, capture_output=True, text=True, timeout=seconds, check=False,
    )  # fmt: skip


def test_a_regression_is_red_beside_other_plugins(tmp_path: Path) -> None:
    """Under each plugin's option a green case passes and a red one fails, also after reruns; no run ends in an error."""
    site, bench = tmp_path / "site", tmp_path / "bench"
    pip("install", "--no-deps", "--target", str(site), *PLUGINS)
    bench.mkdir()
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (bench / "test_own.py").write_text(SUITE)
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\nfilterwarnings = ["error"]\n')
    first = run(tmp_path, [site], "--benchmark", "--case=*/test_green", "--perf-update", "--reason=first")
    assert first.returncode == 0, first.stdout + first.stderr
    for option in ("--codspeed", "--cov=.", "--memray", "--reruns=2", "--timeout=60", "--randomly-seed=1"):
        result = run(tmp_path, [site], "--benchmark", "--perf-strict", option)
        last = result.stdout.strip().splitlines()[-1]
        assert result.returncode == 1, f"{option}: {result.stdout}{result.stderr}"
        assert re.fullmatch(r"hpc-core: 2 cases measured \((1 PASS|1 REGRESSED|, )+\); exit code 1", last), option


def test_pytest_benchmarks_own_suite_passes(tmp_path: Path) -> None:
    """Every test of pytest-benchmark passes with hpc-core and other plugins installed, as it does without."""
    site = tmp_path / "site"
    constraints = ROOT / "constraints" / "cpu.txt"
    extras = OWN_SUITE.replace("==", "[aspect,histogram,elasticsearch]==")
    pip("install", "-c", str(constraints), "--target", str(site), extras, "freezegun")
    # Neither codspeed, which takes the place of pytest-benchmark, nor randomly, which changes the order that its tests expect.
    beside = [name for name in PLUGINS if "codspeed" not in name and "randomly" not in name]
    pip("install", "--no-deps", "--target", str(site), *beside)
    pip("download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--dest", str(tmp_path), OWN_SUITE)
    [archive] = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    folder = tmp_path / archive.name.removesuffix(".tar.gz")
    # Its own settings ask for nbmake, and for doctests of its documentation.
    arguments = ["--override-ini=addopts=", "--tb=short", "-q", "--ignore=tests/test_doctest.rst", "tests"]
    result = run(folder, [folder / "tests", site], *arguments, seconds=1800)
    assert result.returncode == 0, result.stdout[-5000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None
    assert int(passed[1]) > 200
