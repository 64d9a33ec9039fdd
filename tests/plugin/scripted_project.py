"""A project with scripted workers and a suite in bench/, which turns warnings into errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec
import pytest

from hpc_core.baselines.accept import accept
from hpc_core.plugin import runner
from hpc_core.record.record import record_from_json
from tests.plugin.scripted_launcher import ScriptedLauncher

Run = Callable[..., pytest.RunResult]


def scripted_project(
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
    files: Mapping[str, str] | None = None,
    *,
    launcher: type[ScriptedLauncher] = ScriptedLauncher,
) -> Run:
    """Make the project, with these files in its bench/, and return a function that runs pytest in it."""
    monkeypatch.setattr(runner, "Launcher", launcher)
    monkeypatch.setenv("HPC_CORE_COMMIT", "0123abc")  # the commit of scripted records
    pytester.makepyprojecttoml("""
        [tool.pytest.ini_options]
        addopts = ["--strict-markers", "--strict-config", "-p", "no:cacheprovider"]
        filterwarnings = ["error"]
    """)
    folder = pytester.mkdir("bench")
    for name, text in (files or {}).items():
        (folder / name).write_text(text)

    return pytester.runpytest_inprocess


def lower(pytester: pytest.Pytester, run: Run, peak: int) -> None:
    """Accept a peak that differs from what the suite measures; the case, and so its digest, stays the same."""
    run("--perf-update", "--reason", "first")
    root = pytester.path / "baselines"
    for history in root.rglob("*.history.jsonl"):
        record = record_from_json(history.read_text().splitlines()[-1])
        metrics = record.metrics | {"peak_bytes": msgspec.structs.replace(record.metrics["peak_bytes"], value=peak)}
        accept(root, msgspec.structs.replace(record, metrics=metrics), reason="doctored")
