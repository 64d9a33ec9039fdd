"""A project with scripted workers and a suite in bench/, which turns warnings into errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from hpc_core.plugin import runner
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
    pytester.makepyprojecttoml("""
        [tool.pytest.ini_options]
        addopts = ["--strict-markers", "--strict-config", "-p", "no:cacheprovider"]
        filterwarnings = ["error"]
    """)
    folder = pytester.mkdir("bench")
    for name, text in (files or {}).items():
        (folder / name).write_text(text)

    return pytester.runpytest_inprocess
