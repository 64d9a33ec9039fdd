"""Options of the plugin: nonsense is refused in one line with exit code 4. No case runs here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hpc_core.catalogue import ALL
from hpc_core.faults.catalogue import FAULTS
from hpc_core.plugin import fixture, options, runner, suite

ROOT = Path(__file__).parents[2]
Refused = Callable[..., str]


@pytest.fixture
def refused(pytester: pytest.Pytester) -> Refused:
    """Return what pytest prints when it refuses these arguments in a project with a suite."""
    folder = pytester.mkdir("bench")
    (folder / "test_all.py").write_text(
        "from hpc_core import perf_cases\nfrom hpc_core.catalogue import ALL\n\n"
        "@perf_cases(ALL)\ndef test_all(case, perf):\n    perf(case)\n"
    )

    def output_of(*arguments: str) -> str:
        result = pytester.runpytest_inprocess("--benchmark", *arguments)
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        text = str(result.stderr) + str(result.stdout)
        assert "INTERNALERROR" not in text
        assert "Traceback" not in text
        return text

    return output_of


def test_a_mistyped_case_names_similar_ones(refused: Refused) -> None:
    """An id that matches nothing is an error that names similar ids."""
    assert "Near: tiny/lora, " in refused("--case", "tiny/lroa")


def test_an_update_needs_a_reason(refused: Refused) -> None:
    """Numbers are accepted only with a reason; a reason without an update is refused."""
    assert "needs --reason" in refused("--perf-update")
    assert "needs --reason" in refused("--perf-update", "--reason", "  ")
    assert "--reason needs --perf-update" in refused("--reason", "because")


def test_a_fault_is_never_accepted(refused: Refused) -> None:
    """An injected fault and an update exclude each other; for an unknown fault the message lists the known ones."""
    fault = next(iter(FAULTS))
    assert "cannot be a baseline" in refused("--perf-fault", fault, "--perf-update", "--reason", "x")
    assert fault in refused("--perf-fault", "unheard-of")


def test_a_folder_of_baselines_that_is_not_there(pytester: pytest.Pytester, refused: Refused) -> None:
    """A folder that an option or the ini file names must exist, or everything would be skipped; --perf-update makes it."""
    text = refused("--perf-baselines=/nope")
    assert "--perf-baselines: the folder /nope does not exist. Correct its name, or write its first baseline" in text
    assert "is not a folder" in refused("--perf-baselines=bench/test_all.py")
    assert "is not a folder" in refused("--perf-baselines=bench/test_all.py", "--perf-update", "--reason=r")
    pytester.makeini("[pytest]\nperf_baselines = perf/accepted\n")
    assert "perf_baselines: the folder" in refused()


@pytest.mark.parametrize("option", ["--perf-records", "--perf-baselines", "--perf-resume"])
def test_a_folder_elsewhere_must_not_cost_the_settings(
    pytester: pytest.Pytester, refused: Refused, tmp_path_factory: pytest.TempPathFactory, option: str
) -> None:
    """pytest takes the value of `--perf-records /tmp/runs` for a test, moves its root folder and loses the ini file: one line says what to write."""
    pytester.makeini("[pytest]\nperf_baselines = accepted\n")
    elsewhere = str(tmp_path_factory.mktemp("runs"))
    text = refused(option, elsewhere)
    assert f"so it does not read {pytester.path / 'tox.ini'}. Write {option}={elsewhere}." in text
    pytester.mkdir("accepted")
    below = pytester.runpytest_inprocess("--benchmark", "--collect-only", "-q", "--perf-records", "accepted")
    joined = pytester.runpytest_inprocess("--benchmark", "--collect-only", "-q", f"--perf-records={elsewhere}")
    assert (below.ret, joined.ret) == (0, 0)


def test_cases_do_not_run_in_parallel(refused: Refused) -> None:
    """-n is refused: cases would disturb each other."""
    pytest.importorskip("xdist")
    assert "Drop -n" in refused("-n", "2")


def test_pytest_benchmark_must_be_there(refused: Refused) -> None:
    """The suite is refused without pytest-benchmark, whose table it fills."""
    assert "drop -p no:benchmark" in refused("-p", "no:benchmark")


def test_a_suite_that_is_not_there(pytester: pytest.Pytester) -> None:
    """Without bench/ and without a path there is nothing to run, which is a usage error."""
    result = pytester.runpytest_inprocess("--benchmark")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*nothing to run*perf_paths*"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "no such case file"),
        ("1 / 0", "ZeroDivisionError"),
        ("CASES = 3", "must be a list"),
        ("from hpc_core.catalogue import TINY\nCASES = [TINY[0], TINY[0]]", "two cases are called"),
    ],
    ids=["missing", "raises", "no list", "twins"],
)
def test_a_case_file_that_is_wrong(refused: Refused, tmp_path: Path, text: str | None, expected: str) -> None:
    """An error in a file of cases is one line with the name of the file."""
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    output = refused(f"--perf-cases={path}")
    assert expected in output
    assert "mine.py" in output


def test_two_tests_cannot_share_a_baseline(pytester: pytest.Pytester, refused: Refused) -> None:
    """Two tests with one case would overwrite each other's baseline."""
    (pytester.path / "bench" / "test_again.py").write_text((pytester.path / "bench" / "test_all.py").read_text())
    assert "Rename one of them" in refused()


def test_own_cases_are_collected_with_the_suite(pytester: pytest.Pytester, refused: Refused) -> None:
    """Each case of a user's file is a test of that file, with the case's id."""
    (pytester.path / "mine.py").write_text(
        "from hpc_core.catalogue import tiny, finetune, lora\nCASES = [finetune(tiny, lora(rank=2), variant='lora-r2')]\n"
    )
    result = pytester.runpytest_inprocess(
        "--benchmark", "--cases=mine.py", "--collect-only", "-q", "--case", "tiny/lora*"
    )
    assert result.ret == 0
    result.stdout.fnmatch_lines(["mine.py::test_case[[]tiny/lora-r2]"])
    result.stdout.fnmatch_lines(["bench/test_all.py::test_all[[]tiny/lora]"])


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide any GPU."""
    for module in (options, suite, runner, fixture):
        monkeypatch.setattr(module, "visible_gpus", tuple)


@pytest.mark.usefixtures("no_gpu")
def test_what_runs_where_there_is_no_gpu(pytester: pytest.Pytester, refused: Refused) -> None:
    """By default the tiny scale is chosen; -m perf_gpu chooses the full one, whose cases are skipped with the reason."""
    listed = pytester.runpytest_inprocess("--benchmark", "--collect-only", "-q").outlines
    ids = [line for line in listed if "::" in line]
    assert ids
    assert all("[tiny/" in line for line in ids)
    on_gpu = pytester.runpytest_inprocess("--benchmark", "-m", "perf_gpu", "-rs")
    assert on_gpu.ret == 0
    whole = sum(case.scale == "full" for case in ALL)
    on_gpu.assert_outcomes(skipped=whole, deselected=len(ALL) - whole)
    on_gpu.stdout.fnmatch_lines(["SKIPPED*needs a CUDA GPU: none is visible"])


@pytest.mark.usefixtures("no_gpu", "refused")
def test_what_settings_leave_out_is_counted_in_the_last_line(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scale, or no predictions, in addopts or PYTEST_ADDOPTS would turn the suite off in silence; on the command line it is meant."""
    (pytester.path / "bench" / "test_predicted.py").write_text(
        "from hpc_core import predicted_cases\nfrom hpc_core.catalogue import finetune, tiny\n\n"
        "CASE = finetune(tiny, variant='full', batch=2, length=64, steps=2)\n\n"
        "@predicted_cases([CASE], gpu='RTX 4090', short=['tiny/full'])\ndef test_it(case, perf): perf(case)\n"
    )
    chosen = pytester.runpytest_inprocess("--benchmark", "--perf-scale=full")
    chosen.stdout.no_fnmatch_line("*left out by*")
    tiny = sum(case.scale == "tiny" for case in ALL)
    ending = "in settings or PYTEST_ADDOPTS"
    pytester.makeini("[pytest]\naddopts = --perf-scale=full\n")
    for environment, by in (("", "--perf-scale=full"), ("--perf-predict=off", "--perf-predict=off")):
        monkeypatch.setenv("PYTEST_ADDOPTS", environment)
        result = pytester.runpytest_inprocess("--benchmark")
        cases = f"{tiny} cases left out by --perf-scale=full {ending}"
        result.stdout.fnmatch_lines([f"hpc-core: *; {cases}; 1 prediction left out by {by} {ending}*"])


ON_REQUEST = """
import pytest
from hpc_core import perf_cases
from hpc_core.catalogue import catalogue

CASES = [catalogue()[name] for name in ("tiny/lora", "tiny/qlora")]

@perf_cases(CASES, on_request=["tiny/qlora"])
def test_case(case, perf): perf(case)

@pytest.mark.perf_on_request
def test_own(perf): perf(lambda: None)
"""


@pytest.mark.parametrize(
    ("arguments", "chosen"),
    [
        ([], {"tiny/lora"}),
        (["--all"], {"tiny/lora", "tiny/qlora", "own"}),
        (["--case", "tiny/qlora"], {"tiny/qlora"}),
        (["bench/test_some.py"], {"tiny/lora", "tiny/qlora", "own"}),
        (["bench"], {"tiny/lora"}),
    ],
    ids=["default", "all", "case", "file", "folder"],
)
def test_what_is_on_request_runs_when_it_is_asked_for(
    pytester: pytest.Pytester, refused: Refused, arguments: list[str], chosen: set[str]
) -> None:
    """Tests on request run with --perf-all, or if their case or file is named; otherwise a line counts them."""
    (pytester.path / "bench" / "test_all.py").unlink()
    (pytester.path / "bench" / "test_some.py").write_text(ON_REQUEST)
    result = pytester.runpytest_inprocess("--benchmark", "--collect-only", "-q", *arguments)
    found = {line.partition("::")[2] for line in result.outlines if "::" in line}
    assert found == {"test_own" if name == "own" else f"test_case[{name}]" for name in chosen}
    if len(chosen) == 1 and "--case" not in arguments:
        listed = pytester.runpytest_inprocess("--benchmark", "--collect-only", *arguments)
        listed.stdout.fnmatch_lines(["hpc-core: 2 more on request, by --all, --case or their file"])


@pytest.mark.usefixtures("no_gpu")
def test_a_step_of_ones_own_that_needs_a_gpu(pytester: pytest.Pytester, refused: Refused) -> None:
    """Marked perf_gpu it is of the full scale: a run without a GPU leaves it out, and --perf-scale full skips it."""
    (pytester.path / "bench" / "test_all.py").write_text(
        "import pytest\n\n@pytest.mark.perf_gpu\ndef test_it(perf):\n    perf('a:b', device='cuda')\n"
    )
    pytester.runpytest_inprocess("--benchmark").assert_outcomes(deselected=1)
    pytester.runpytest_inprocess("--benchmark", "--perf-scale=full").assert_outcomes(skipped=1)


def test_collecting_loads_no_torch(pytester: pytest.Pytester) -> None:
    """`pytest --benchmark --collect-only` of our own bench/ never imports torch."""
    pytester.makepyfile(
        no_torch="import sys\n\ndef pytest_unconfigure():\n    print('TORCH', 'torch' in sys.modules)\n"
    )
    result = pytester.runpytest_subprocess(
        "--benchmark", "--collect-only", "-q", "-p", "no_torch", "--rootdir", str(ROOT), str(ROOT / "bench")
    )
    assert result.ret == 0
    result.stdout.fnmatch_lines(["*tiny/lora*", "TORCH False"])
