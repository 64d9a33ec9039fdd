"""Under strict the exit code comes from what was measured: ways to be green without it, none of which is. Workers are scripted.

Each way is a project with one case, which is REGRESSED or has no baseline wherever it runs.
"""

from __future__ import annotations

import shutil
from typing import NamedTuple

import pytest

from hpc_core.plugin import fixture, options, runner, suite
from tests.plugin.scripted_project import Run, scripted_project
from tests.record.git_project import GitProject

pytestmark = pytest.mark.slow

RED = "perf('scripted:step', peak=2**31, limits=__import__('hpc_core').Limits(peak_bytes=2**30))"
CASE = f"def test_step(perf):\n    {RED}\n"
NEW = "perf('scripted:step', peak=2**30)"


class Way(NamedTuple):
    """One way to be green: the suite, its conftest.py, settings, environment and arguments."""

    suite: str = CASE
    conftest: str = ""
    addopts: tuple[str, ...] = ()
    environment: str = ""
    arguments: tuple[str, ...] = ()


def marked(mark: str) -> str:
    """Return a conftest.py that gives every test this mark."""
    return (
        "import pytest\n\ndef pytest_collection_modifyitems(items):\n"
        f"    for item in items:\n        item.add_marker(pytest.mark.{mark})\n"
    )


def hook(text: str) -> str:
    """Return a conftest.py with this text below its import."""
    return f"import pytest\n\n{text}\n"


def calling(body: str, mark: str = "") -> str:
    """Return a suite of one test with this body, and a mark."""
    lines = "\n    ".join(body.splitlines())
    return f"import concurrent.futures, contextlib, pytest\n\n{mark}\ndef test_step(perf):\n    {lines}\n"


def case_of_unittest(body: str, decorator: str = "") -> str:
    """Return a unittest.TestCase that gets the fixture and runs this body in its test."""
    return (
        "import pytest, unittest\n\nclass TestStep(unittest.TestCase):\n"
        "    @pytest.fixture(autouse=True)\n    def _take(self, perf):\n        self.perf = perf\n\n"
        f"    {decorator}\n    def test_step(self):\n        {body}\n"
    )


def in_fixture(body: str) -> str:
    """Return a suite whose case runs in a fixture."""
    lines = "\n    ".join(body.splitlines())
    return f"import pytest\n\n@pytest.fixture\ndef measured(perf):\n    {lines}\n\ndef test_step(measured):\n    pass\n"


WAYS = {
    "benchmark-skip in the environment": Way(environment="--benchmark-skip"),
    "benchmark-skip in addopts": Way(addopts=("--benchmark-skip",)),
    "a skip mark from a conftest": Way(conftest=marked("skip(reason='flaky')")),
    "a skipif mark from a conftest": Way(conftest=marked("skipif(True, reason='flaky')")),
    "an xfail mark from a conftest": Way(conftest=marked("xfail(reason='flaky', strict=False)")),
    "an xfail mark that does not run": Way(conftest=marked("xfail(run=False)")),
    "a skip mark on the test": Way(calling(RED, "@pytest.mark.skip")),
    "an xfail mark on the test": Way(calling(RED, "@pytest.mark.xfail(strict=False)")),
    "pytest.skip in the test": Way(calling(f"pytest.skip('later')\n{RED}")),
    "pytest.xfail after the case": Way(
        calling(f"with contextlib.suppress(BaseException):\n    {RED}\npytest.xfail('known')")
    ),
    "pytest.skip after the case": Way(
        calling(f"with contextlib.suppress(BaseException):\n    {RED}\npytest.skip('known')")
    ),
    "pytest.importorskip in the test": Way(calling(f"pytest.importorskip('no_such_module')\n{RED}")),
    "a module that skips itself": Way(f"import pytest\n\npytest.skip('not today', allow_module_level=True)\n\n{CASE}"),
    "a module that needs a library": Way(f"import pytest\n\npytest.importorskip('no_such_module')\n\n{CASE}"),
    "a fixture that skips": Way(in_fixture(f"pytest.skip('later')\n{RED}")),
    "a conftest that skips in setup": Way(conftest=hook("def pytest_runtest_setup(item):\n    pytest.skip('later')")),
    "an exception that is swallowed": Way(calling(f"with contextlib.suppress(BaseException):\n    {RED}")),
    "a failure that is expected": Way(calling(f"with pytest.raises(BaseException):\n    {RED}")),
    "a thread": Way(calling(f"with concurrent.futures.ThreadPoolExecutor() as pool:\n    pool.submit(lambda: {RED})")),
    "a test that never calls perf": Way(calling("pass")),
    "a call behind a condition": Way(calling(f"if not perf:\n    {RED}")),
    "a hook that runs no test": Way(conftest=hook("def pytest_runtest_protocol(item):\n    return True")),
    "a hook that calls no test": Way(conftest=hook("def pytest_pyfunc_call(pyfuncitem):\n    return True")),
    "a report that is made green": Way(
        conftest=hook(
            "@pytest.hookimpl(wrapper=True)\ndef pytest_runtest_makereport(item, call):\n"
            "    report = yield\n    report.outcome = 'passed'\n    report.longrepr = None\n    return report"
        )
    ),
    "a case that is removed": Way(conftest=hook("def pytest_collection_modifyitems(items):\n    items[:] = []")),
    "a case that is deselected": Way(
        conftest=hook(
            "def pytest_collection_modifyitems(config, items):\n"
            "    config.hook.pytest_deselected(items=items)\n    items[:] = []\n\n"
            "def pytest_sessionfinish(session, exitstatus):\n    session.exitstatus = 0"
        )
    ),
    "an exit code that is made green": Way(
        conftest=hook("@pytest.hookimpl(trylast=True)\ndef pytest_sessionfinish(session):\n    session.exitstatus = 0")
    ),
    "a session that is left": Way(calling(f"pytest.exit('enough', returncode=0)\n{RED}")),
    "a main program of one's own": Way(conftest=hook("def pytest_cmdline_main(config):\n    return 0")),
    "a file that is ignored": Way(
        conftest=hook(
            "collect_ignore_glob = ['*']\n\ndef pytest_sessionfinish(session, exitstatus):\n    session.exitstatus = 0"
        )
    ),
    "-k that matches nothing": Way(
        environment="-k nothing", conftest=hook("def pytest_sessionfinish(session):\n    session.exitstatus = 0")
    ),
    "collect-only in the environment": Way(environment="--collect-only"),
    "collect-only in addopts": Way(addopts=("--collect-only",)),
    "setup-plan in the environment": Way(environment="--setup-plan"),
    "setup-only in the environment": Way(environment="--setup-only"),
    "fixtures in the environment": Way(environment="--fixtures"),
    "markers in the environment": Way(environment="--markers"),
    "the full scale without a GPU": Way(
        "from hpc_core import perf_cases\nfrom hpc_core.catalogue import ALL\n\n"
        "@perf_cases(ALL)\ndef test_all(case, perf):\n    perf(case)\n",
        arguments=("--perf-scale=full", "--perf-predict=off"),
    ),
    "an update in addopts": Way(calling(NEW), addopts=("--perf-update", "--perf-reason=more")),
    "an update in the environment": Way(calling(NEW), environment="--perf-update --perf-reason=more"),
    "another case, chosen in the environment": Way(
        f"{CASE}\ndef test_other(perf):\n    {NEW.replace(')', ', judge=False)')}\n",
        environment="--perf-case=*/test_other",
    ),
    "help in the environment": Way(environment="--help"),
    "a hook that ends the process after the session": Way(
        conftest="import sys\n\ndef pytest_sessionfinish():\n    sys.exit(0)  # not cmdline_main\n"
    ),
    "our plugin object blocked": Way(addopts=("-p", "no:hpc-core-suite")),
    "our plugin object unregistered": Way(
        conftest=hook(
            "def pytest_collection_finish(session):\n    session.config.pluginmanager.unregister(name='hpc-core-suite')"
        )
    ),
    "a parametrization without values": Way(
        calling(RED, "@pytest.mark.parametrize('perf_', [])").replace("(perf)", "(perf, perf_)")
    ),
    "a subtest": Way(f"def test_step(perf, subtests):\n    with subtests.test():\n        {RED}\n"),
    "a step that needs a GPU": Way(calling("perf('scripted:step', device='cuda')")),
    "unittest: a regression that is expected": Way(case_of_unittest(f"self.{RED}", "@unittest.expectedFailure")),
    "unittest: no baseline": Way(case_of_unittest(f"self.{NEW}")),
    "unittest: a test that is skipped": Way(case_of_unittest(f"self.{RED}", "@unittest.skip('later')")),
    "unittest: skipTest": Way(case_of_unittest(f"self.skipTest('later'); self.{RED}")),
    "no baseline, in a fixture": Way(in_fixture(f"return {NEW}")),
    "no baseline, in a fixture's teardown": Way(in_fixture(f"yield\n{NEW}")),
    "a regression in a fixture's teardown, expected": Way(
        in_fixture(f"yield\n{RED}"), conftest=marked("xfail(strict=False)")
    ),
    "a test that runs again": Way(
        conftest=hook(
            "from _pytest.runner import runtestprotocol\n\ndef pytest_runtest_protocol(item, nextitem):\n"
            "    for attempt in range(3):\n        item._initrequest()\n"
            "        reports = runtestprotocol(item, nextitem=nextitem, log=False)\n"
            "    for report in reports:\n        report.outcome = 'passed'\n"
            "        item.ihook.pytest_runtest_logreport(report=report)\n    return True"
        )
    ),
}


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run pytest in a project on a machine without a GPU."""
    for module in (options, suite, runner, fixture):
        monkeypatch.setattr(module, "visible_gpus", tuple)
    return scripted_project(pytester, monkeypatch)


def lay(pytester: pytest.Pytester, way: Way) -> None:
    """Write the project of one way, with its baseline."""
    (pytester.path / "bench" / "test_own.py").write_text(way.suite)
    (pytester.path / "bench" / "conftest.py").write_text(way.conftest)
    (pytester.path / "conftest.py").write_text(way.conftest if "cmdline_main" in way.conftest else "")
    addopts = ["-p", "no:cacheprovider", *way.addopts]
    (pytester.path / "pyproject.toml").write_text(f"[tool.pytest.ini_options]\naddopts = {addopts}\n")


@pytest.mark.parametrize("name", WAYS)
def test_no_way_is_green(pytester: pytest.Pytester, run: Run, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The exit code is 1 if a row is REGRESSED, and not 0 without one; there is no traceback of ours."""
    way = WAYS[name]
    lay(pytester, way)
    monkeypatch.setenv("PYTEST_ADDOPTS", way.environment)
    result = run("--benchmark", "--perf-strict", *way.arguments)
    assert result.ret == 1 if "REGRESSED" in str(result.stdout) else result.ret != 0
    assert "INTERNALERROR" not in str(result.stdout) + str(result.stderr)


def last(result: pytest.RunResult) -> str:
    """Return the last line of a run."""
    return [line for line in result.outlines if line][-1]


def test_strict_is_the_default_where_ci_is_set(
    pytester: pytest.Pytester, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CI makes a run strict, and its header says so. --perf-lenient, an empty CI and CI=false do not."""
    lay(pytester, Way(calling(NEW)))
    monkeypatch.setenv("CI", "true")
    strict = run("--benchmark")
    assert strict.ret == 10
    strict.stdout.fnmatch_lines(["hpc-core: *, strict (CI is set)"])
    assert run("--benchmark", "--perf-lenient").ret == 0
    for value in ("", "0", "false"):
        monkeypatch.setenv("CI", value)
        assert run("--benchmark").ret == 0


def test_the_last_line_says_what_was_measured(pytester: pytest.Pytester, run: Run) -> None:
    """Cases with their verdicts, cases that were not measured with the reasons, cases that wait for a request, and the exit code where it is not 0."""
    lay(
        pytester,
        Way(f"""
import pytest

def test_red(perf):
    {RED}

def test_new(perf):
    {NEW}

@pytest.mark.parametrize("number", [1, 2])
def test_on_a_gpu(perf, number):
    perf("scripted:step", device="cuda")

def test_without(perf):
    pass

@pytest.mark.skip(reason="flaky")
def test_flaky(perf):
    {NEW}

@pytest.mark.perf_on_request
def test_long(perf):
    {NEW}
"""),
    )
    whole = run("--benchmark", "--deselect=bench/test_own.py::test_flaky")
    assert last(whole) == (
        "hpc-core: 2 cases measured (1 REGRESSED, 1 NO_BASELINE); not measured: 2 (needs a CUDA GPU: none is visible), "
        "1 (its test did not call perf); 1 deselected; 1 more on request; exit code 1"
    )
    assert last(run("--benchmark", "--case=*/test_flaky")) == "hpc-core: no case measured; not measured: 1 (flaky)"
    strict = run("--benchmark", "--case=*/test_flaky", "--perf-strict", "-q")
    assert last(strict) == "hpc-core: no case measured; not measured: 1 (flaky); exit code 10 (--perf-strict)"


def test_what_is_measured_without_a_baseline_is_green(pytester: pytest.Pytester, run: Run) -> None:
    """Strict is green where every case was measured and is as accepted, relies on its own assertions, or was only listed."""
    lay(pytester, Way(calling(NEW)))
    run("--benchmark", "--perf-update", "--reason=first")
    assert run("--benchmark", "--perf-strict").ret == 0
    assert run("--benchmark", "--perf-strict", "--collect-only").ret == 0
    shutil.rmtree(pytester.path / "baselines")
    lay(pytester, Way(calling(NEW.replace(")", ", judge=False)"))))
    assert run("--benchmark", "--perf-strict").ret == 0


OTHER = f"def test_other(perf):\n    {NEW}\n"


def whole_suite(pytester: pytest.Pytester, run: Run) -> None:
    """Accept two cases in two files, in a repository."""
    GitProject(pytester.path)
    lay(pytester, Way(f"def test_step(perf):\n    {NEW}\n"))
    (pytester.path / "bench" / "test_other.py").write_text(OTHER)
    assert run("--benchmark", "--perf-update", "--reason=first").ret == 0
    assert run("--benchmark", "--perf-strict").ret == 0


@pytest.mark.parametrize(
    "way", ["--ignore in addopts", "--lf in addopts", "collect_ignore", "renamed", "deleted", "__test__", "perf"]
)
def test_an_accepted_case_that_is_no_longer_collected(pytester: pytest.Pytester, run: Run, way: str) -> None:
    """Beside a green case, whatever keeps pytest from seeing another one: strict is not green, and the last line names it."""
    whole_suite(pytester, run)
    own, ini = pytester.path / "bench" / "test_own.py", pytester.path / "pyproject.toml"
    if way == "--ignore in addopts":
        ini.write_text('[tool.pytest.ini_options]\naddopts = ["--ignore=bench/test_own.py"]\n')
    elif way == "--lf in addopts":
        ini.write_text('[tool.pytest.ini_options]\naddopts = ["--lf"]\n')
        cache = pytester.path / ".pytest_cache" / "v" / "cache"
        cache.mkdir(parents=True)
        (cache / "lastfailed").write_text('{"bench/test_other.py::test_other": true}')
    elif way == "collect_ignore":
        (pytester.path / "bench" / "conftest.py").write_text("collect_ignore = ['test_own.py']\n")
    elif way == "renamed":
        own.rename(own.with_name("own.py"))
    elif way == "deleted":
        own.unlink()
    elif way == "__test__":
        own.write_text(f"{own.read_text()}\ntest_step.__test__ = False\n")
    else:
        own.write_text(
            f"import pytest\n\n@pytest.fixture\ndef perf():\n    return lambda *_, **__: None\n\n{own.read_text()}"
        )
    result = run("--benchmark", "--perf-strict")
    assert result.ret == 10
    assert last(result) == (
        "hpc-core: 1 case measured (1 PASS); accepted, and no test judges it: test_own/test_step "
        "(restore the test, or delete the baseline); exit code 10 (--perf-strict)"
    )
    assert run("--benchmark").ret == 0


@pytest.mark.parametrize(
    "way", ["judge=False", "perf_gpu", "-k in addopts", "a path in addopts", "deselected by a conftest.py"]
)
def test_an_accepted_case_that_is_no_longer_judged(pytester: pytest.Pytester, run: Run, way: str) -> None:
    """A test with judge=False, of a scale that this machine does not run, or deselected: strict is not green while its case has a baseline."""
    whole_suite(pytester, run)
    own = pytester.path / "bench" / "test_own.py"
    text = own.read_text()
    if way == "judge=False":
        own.write_text(text.replace(NEW, NEW.replace(")", ", judge=False)")))
    elif way == "perf_gpu":
        own.write_text(f"import pytest\n\n@pytest.mark.perf_gpu\n{text}")
    elif way.endswith("in addopts"):
        chosen = '"-k", "other"' if way.startswith("-k") else '"bench/test_other.py"'
        (pytester.path / "pyproject.toml").write_text(f"[tool.pytest.ini_options]\naddopts = [{chosen}]\n")
    else:
        (pytester.path / "bench" / "conftest.py").write_text(
            "def pytest_collection_modifyitems(config, items):\n    config.hook.pytest_deselected(items=[items.pop(1)])\n"
        )
    result = run("--benchmark", "--perf-strict")
    assert result.ret == 10
    assert "; accepted, and no test judges it: test_own/test_step (restore the test, or delete the baseline)" in last(
        result
    )


def test_a_part_of_the_suite_that_is_chosen_by_hand_misses_nothing(pytester: pytest.Pytester, run: Run) -> None:
    """A path, a case or an option on the command line chooses less than the suite. Cases of other suites are only counted."""
    whole_suite(pytester, run)
    for chosen in ("bench/test_other.py", "--case=*/test_other", "--ignore=bench/test_own.py", "-k=other", "-kother"):
        assert run("--benchmark", "--perf-strict", chosen).ret == 0
    far = pytester.mkdir("perf") / "test_far.py"
    far.write_text(OTHER.replace("test_other", "test_far"))
    assert run("--benchmark", "--perf-update", "--reason=first", "perf").ret == 0
    result = run("--benchmark", "--perf-strict")
    assert result.ret == 0
    assert last(result) == "hpc-core: 2 cases measured (2 PASS); 1 other accepted case not in this suite"


@pytest.mark.parametrize(
    ("conftest", "step", "code"),
    [
        ("", "perf(lambda: os._exit(0))", 11),
        ("sys.exit(0)", "pass", 10),
        ("def pytest_unconfigure():\n    sys.exit(0)", "pass", 10),
    ],
    ids=["os._exit in the step", "sys.exit in a conftest.py", "sys.exit in the last hook"],
)
def test_a_process_that_is_ended_is_not_green(
    pytester: pytest.Pytester, run: Run, conftest: str, step: str, code: int
) -> None:
    """Whoever ends pytest's own process with 0, as some training scripts do, does not end the run green. Children may do so."""
    body = f"if not os.fork():\n    os._exit(0)\nos.wait()\n{step}"
    lay(pytester, Way(calling(f"import os\n{body}")))
    (pytester.path / "conftest.py").write_text(f"import sys\n\n{conftest}\n")
    result = pytester.runpytest_subprocess("--benchmark", "--perf-strict")
    assert result.ret == code
    assert "hpc-core: " in str(result.stdout) + str(result.stderr)
    assert "Traceback" not in str(result.stderr)


RERUNS = """
from _pytest.runner import runtestprotocol

def pytest_runtest_protocol(item, nextitem):
    for attempt in range(3):
        item._initrequest()
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
        if not any(report.failed for report in reports):
            break
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    return True
"""
FLAKY = """
from hpc_core import Limits

peaks = [2**31, 2**29, 2**29]

def test_step(perf):
    perf("scripted:step", peak=peaks.pop(0), limits=Limits(peak_bytes=2**30))
"""


def test_a_rerun_excuses_no_regression(pytester: pytest.Pytester, run: Run) -> None:
    """A plugin that runs failed tests again gets the same failure, and nothing is measured again; strict or not."""
    lay(pytester, Way(FLAKY, conftest=RERUNS))
    for options_ in ((), ("--perf-strict",)):
        result = run("--benchmark", *options_)
        result.assert_outcomes(failed=1)
        assert result.ret == 1
        assert last(result) == "hpc-core: 1 case measured (1 REGRESSED); exit code 1"
