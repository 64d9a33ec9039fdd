"""The pytest plugin. It does nothing without `--benchmark`, and never imports torch.

This module is always loaded: options, markers, fixtures, and the skipping of tests that measure. `suite` is the rest.
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from hpc_core.plugin.fixture import Perf, PerfSession

_SUITE = "hpc-core-suite"
_NEEDS = "needs --benchmark"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add options and ini options."""
    from hpc_core.plugin.options import add_options

    add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    """Register markers, and with `--benchmark` the suite.

    Raises:
        pytest.UsageError: options contradict each other.
    """
    config.addinivalue_line("markers", "perf_gpu: needs a CUDA GPU; `perf_cases` marks such cases")
    config.addinivalue_line("markers", "perf_on_request: runs only with --perf-all, or if its case or file is named")
    config.addinivalue_line(
        "markers", "perf_predicted: predicts a case without a GPU; `predicted_cases` marks such tests"
    )
    if not config.getoption("perf_active"):
        return
    from hpc_core.plugin.options import read_settings
    from hpc_core.plugin.suite import Suite

    settings = read_settings(config)
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = _paths(config, settings.paths, settings.case_files)
    elif config.getoption("perf_case_files"):
        config.args = [*config.args, *map(str, settings.case_files)]
    config.pluginmanager.register(Suite(config, settings), _SUITE)


@pytest.hookimpl(wrapper=True)
def pytest_load_initial_conftests(
    early_config: pytest.Config, parser: pytest.Parser, args: list[str]
) -> Generator[None, None, None]:
    """Make short names of options ours where the conftest.py files leave them free.

    Tell `git bisect run` to skip a commit whose conftest.py cannot be imported; by pytest's exit code it would be bad.
    Let no conftest.py end the run green.
    """
    from hpc_core.plugin.options import is_given, use_short_names

    try:
        yield
    except SystemExit as error:
        if error.code or not is_given(early_config, "--perf-benchmark", "--benchmark"):
            raise
        raise SystemExit(_cannot_begin()) from error
    except Exception as error:
        if not getattr(early_config.known_args_namespace, "perf_bisect", False):
            raise
        raise SystemExit(_cannot_test(error)) from error
    use_short_names(early_config, parser, args)


@pytest.hookimpl(wrapper=True)
def pytest_cmdline_main(config: pytest.Config) -> Generator[None, object, object]:
    """Under strict, let nothing turn an exit code of ours into 0.

    Tell `git bisect run` to skip a commit that lacks the case, or a folder or file on the command line.
    """
    try:
        result = yield
        return result if result or not (config.getoption("perf_active") or _is_asked(config)) else _final(config)
    except SystemExit as error:  # a hook of somebody's that ends the process, in place of the session
        if error.code or not config.getoption("perf_active"):
            raise
        return _final(config)
    except pytest.UsageError as error:
        if not config.getoption("perf_bisect"):
            raise
        return _cannot_test(error)


def _is_asked(config: pytest.Config) -> bool:
    """Return whether the command line asks for the suite: with PYTEST_ADDOPTS=--help pytest does not read that far."""
    from hpc_core.plugin.options import is_given, spelled

    return is_given(config, "--perf-benchmark", spelled(config, "--benchmark"))


def _final(config: pytest.Config) -> int:
    from hpc_core.gate.exit_code import ExitCode
    from hpc_core.plugin.options import is_given, is_listing, strictness

    strict = strictness(config) or ("--perf-strict" if is_given(config, "--perf-strict") else "")
    suite: Any = config.pluginmanager.get_plugin(_SUITE)
    decided: int = ExitCode.NOT_COMPARABLE if suite is None or suite.decided is None else suite.decided
    if not decided or not strict or is_listing(config):
        return ExitCode.OK
    sys.stderr.write(f"hpc-core: pytest ended with 0; the exit code is {decided} ({strict}).\n")
    return decided


def _cannot_test(error: Exception) -> int:
    from hpc_core.gate.exit_code import ExitCode

    sys.stderr.write(f"hpc-core: this commit cannot be tested: {error}\n")
    return ExitCode.CANNOT_TEST


def _cannot_begin() -> int:
    from hpc_core.gate.exit_code import ExitCode

    sys.stderr.write("hpc-core: a conftest.py called sys.exit(0), so no case was measured.\n")
    return ExitCode.NOT_COMPARABLE


def _paths(config: pytest.Config, paths: tuple[str, ...], case_files: tuple[Path, ...]) -> list[str]:
    existing = [path for path in paths if Path(path.partition("::")[0]).exists()]
    if existing or case_files:
        return [*existing, *map(str, case_files)]
    from hpc_core.plugin.cases import root_of

    root = root_of(config)
    hint = "Give a path, or set perf_paths in the ini file."
    called = config.invocation_params.dir
    if not called.is_relative_to(root) or (config.inipath is None and called != config.rootpath):
        # pytest chooses its root folder before it knows our options, and mistakes their values for paths of tests.
        hint = f"pytest took {config.rootpath} for the root folder: write options with '=', as --perf-baselines=DIR."
    raise pytest.UsageError(f"--benchmark has nothing to run: {', '.join(paths)} does not exist. {hint}")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests that measure in a run without `--benchmark`."""
    if not config.getoption("perf_active"):
        for item in items:
            if uses_perf(item):
                item.add_marker(pytest.mark.skip(reason=_NEEDS))


def uses_perf(item: pytest.Item, *names: str) -> bool:
    """Return whether a test uses our fixtures of these names; by default `perf` or `perf_session`."""
    return any(_is_ours(item, name) for name in names or ("perf", "perf_session"))


def _is_ours(item: pytest.Item, name: str) -> bool:
    """Return whether a name among a test's fixtures is our fixture: others have fixtures and parameters called `perf`."""
    if name not in getattr(item, "fixturenames", ()):
        return False
    # The last definition is the one that the test gets; if it asks for its own name, it extends the one before it.
    info: Any = getattr(item, "_fixtureinfo", None)
    for definition in reversed(() if info is None else info.name2fixturedefs.get(name, ())):
        if definition.func.__module__ == __name__:
            return True
        if name not in definition.argnames:
            return False
    return False


@pytest.fixture
def perf(request: pytest.FixtureRequest, benchmark: Any) -> Perf:
    """Run a case and judge it: `perf(case)`, `perf("package.module:factory", batch=4)`, or `perf(step)`."""
    try:
        perf: Perf = _suite(request, "perf").perf(request.node, benchmark)
    except (pytest.skip.Exception, pytest.fail.Exception):
        benchmark.skipped = True  # or pytest-benchmark warns that its fixture was not used
        raise
    return perf


@pytest.fixture
def perf_session(request: pytest.FixtureRequest) -> PerfSession:
    """Give access to the session's records, run jobs without judging them, and print sections at the end."""
    session: PerfSession = _suite(request, "perf_session").session
    return session


def _suite(request: pytest.FixtureRequest, name: str) -> Any:
    suite = request.config.pluginmanager.get_plugin(_SUITE)
    if suite is None:
        pytest.skip(_NEEDS)
    if not uses_perf(request.node, name):
        pytest.fail(
            f"request.getfixturevalue({name!r}): make {name} an argument of the test, so that the test counts as a case.",
            pytrace=False,
        )
    return suite
