"""What a user of the plugin sees, in a project with scripted workers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import msgspec
import pytest

from hpc_core.baselines.accept import accept
from hpc_core.baselines.baseline import Baseline
from hpc_core.baselines.lookup import find
from hpc_core.plugin import runner, suite
from hpc_core.record.record import Record, record_from_json
from tests.plugin.scripted_launcher import SAMPLES
from tests.plugin.scripted_project import Run, scripted_project

pytestmark = pytest.mark.slow

GIB = 2**30
STORY = """
from hpc_core import GiB, Limits

def test_step(perf):
    result = perf("scripted:step", peak={peak})
    assert result.metrics["peak_bytes"].value < 8 * GiB
"""


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run pytest in a project whose suite each test writes."""
    return scripted_project(pytester, monkeypatch)


def bench(pytester: pytest.Pytester, text: str = STORY, **values: Any) -> None:
    """Write the suite of the project."""
    (pytester.path / "bench" / "test_own.py").write_text(
        text.format(**({"peak": GIB} | values)) if values or text is STORY else text
    )


def baseline(pytester: pytest.Pytester, case: str = "test_own/test_step") -> Path:
    return pytester.path / "baselines" / "cpu" / f"{case}.json"


def test_without_the_option_nothing_is_measured(pytester: pytest.Pytester, run: Run) -> None:
    """Without --benchmark a case is skipped, and says what it needs."""
    bench(pytester)
    result = run("-rs", "bench")
    assert result.ret == 0
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*needs --benchmark*"])


def test_from_no_baseline_to_a_regression(pytester: pytest.Pytester, run: Run) -> None:
    """A case is skipped without a baseline, passes once accepted, and fails with more memory; the first line says how much."""
    bench(pytester)
    first = run("--benchmark", "-rs")
    assert first.ret == 0
    first.assert_outcomes(skipped=1)
    first.stdout.fnmatch_lines(["*test_own/test_step*NO_BASELINE*", "SKIPPED * bench/test_own.py:4: *NO_BASELINE*"])

    update = run("--benchmark", "--perf-update", "--reason", "the first one")
    assert update.ret == 0
    update.assert_outcomes(passed=1)
    update.stdout.fnmatch_lines(["created *baselines/cpu/test_own/test_step.json: *peak_bytes 1.00 GiB*"])

    second = run("--benchmark")
    assert second.ret == 0
    second.assert_outcomes(passed=1)

    lower(pytester, GIB // 2)
    worse = run("--benchmark")
    assert worse.ret == 1
    worse.assert_outcomes(failed=1)
    worse.stdout.fnmatch_lines([
        "peak_bytes +512.00 MiB, limit +0.05 %",
        "Why: peak +512.00 MiB*",
        "Why: stack and case as before*",
        "*peak_bytes: 512.00 MiB → 1.00 GiB (+512.00 MiB, +100 %), limit +0.05 %",
        "*Accept it: pytest --benchmark --case 'test_own/test_step' --perf-update --reason*",
        "Run it again: pytest --benchmark --case 'test_own/test_step'",
        "*test_own/test_step*REGRESSED*peak_bytes +100 %*",
    ])  # fmt: skip

    ratchet = run("--benchmark", "--perf-update", "--reason", "more on purpose")
    assert ratchet.ret == 0
    ratchet.stdout.fnmatch_lines(["updated *test_step.json: peak_bytes 512.00 MiB → 1.00 GiB"])


def lower(pytester: pytest.Pytester, peak: int, without: str = "") -> None:
    """Accept a peak that differs from what runs measure, and leave out a metric."""
    history = baseline(pytester).with_suffix(".history.jsonl")
    record = record_from_json(history.read_text().splitlines()[-1])
    metrics = record.metrics | {"peak_bytes": msgspec.structs.replace(record.metrics["peak_bytes"], value=peak)}
    metrics.pop(without, None)
    accept(pytester.path / "baselines", msgspec.structs.replace(record, metrics=metrics), reason="doctored")


def test_a_new_metric_fails_nothing_under_strict(pytester: pytest.Pytester, run: Run) -> None:
    """A metric without a baseline leaves its case passing, and the run shows how to accept it."""
    bench(pytester)
    run("--benchmark", "--perf-update", "--reason", "the first one")
    lower(pytester, GIB, without="operators")
    result = run("--benchmark", "--perf-strict")
    assert result.ret == 0
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(
        ["New, not judged in test_own/test_step: operators.*", "*--case *test_own/test_step* --perf-update --reason *"]
    )


def test_a_limit_needs_no_baseline(pytester: pytest.Pytester, run: Run) -> None:
    """An exceeded absolute limit fails even a case without a baseline, and accepting does not lift it."""
    bench(pytester, STORY.replace("peak={peak}", "peak=2 * GiB, limits=Limits(peak_bytes=GiB)"))
    result = run("--benchmark")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["peak_bytes *limit at most 1.00 GiB*", "*allowed is at most 1.00 GiB (+1.00 GiB)*"])
    assert run("--benchmark", "--perf-update", "--reason", "try").ret == 1


@pytest.mark.parametrize(
    ("limits", "line"),
    [
        ("Limits(step_s='abc')", "test_own.py:*: Limits(step_s='abc'): a limit is a percentage such as * in seconds."),
        ("Limits(steps_s='1%')", "test_own.py:*: Limits has no steps_s. Did you mean step_s? There are: peak_bytes, *"),
    ],
)
def test_a_wrong_limit_is_one_line_at_its_place(pytester: pytest.Pytester, run: Run, limits: str, line: str) -> None:
    """It names what is allowed, in a test and where a file is imported, and shows no code of ours."""
    bench(pytester, STORY.replace("peak={peak}", f"limits={limits}"))
    in_test = run("--benchmark")
    bench(pytester, f"from hpc_core.case.limits import Limits\nLIMITS = {limits}\n")
    at_import = run("--benchmark")
    assert (in_test.ret, at_import.ret) == (1, 2)
    for result in (in_test, at_import):
        result.stdout.fnmatch_lines([line])
        result.stdout.no_fnmatch_line("*limits.py*")


def test_the_tests_own_assertions_come_before_the_skip(pytester: pytest.Pytester, run: Run) -> None:
    """Without a baseline the rest of the test still runs and can fail."""
    bench(pytester, peak="9 * GiB")
    result = run("--benchmark", "--perf-strict")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*AssertionError*", "*assert*"])


SEVERAL = """
import pytest

def test_new(perf):
    perf("scripted:step")

def test_crash(perf):
    perf("scripted:crash")

def test_no_library(perf):
    perf("scripted:crash", kind="missing_library")

def test_invalid(perf):
    perf("scripted:invalid")

def test_plain():
    assert not True
"""


@pytest.mark.parametrize(
    ("chosen", "code"),
    [
        (["new"], 10),
        (["no-library"], 10),
        (["crash"], 11),
        (["crash", "new", "no-library"], 11),
        (["invalid"], 1),
        (["invalid", "crash", "new"], 1),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else str(value),
)
def test_exit_codes_under_strict(pytester: pytest.Pytester, run: Run, chosen: list[str], code: int) -> None:
    """Under strict: 1 if something got worse, 11 if runs broke, 10 if nothing could be compared."""
    bench(pytester, SEVERAL)
    cases = [part for name in chosen for part in ("--case", f"test_own/test_{name.replace('no-', 'no_')}")]
    result = run("--benchmark", "--perf-strict", "--deselect", "bench/test_own.py::test_plain", *cases)
    assert result.ret == code


def test_a_missing_baseline_is_reported_once(pytester: pytest.Pytester, run: Run) -> None:
    """Under strict a case without a baseline fails with one line and the commands that accept it and run it again."""
    bench(pytester)
    reported = str(run("--benchmark", "--perf-strict").stdout).partition("FAILURES")[2].partition("Run it again")[0]
    assert reported.count("no baseline of") == 1
    assert "Accept it: pytest --benchmark --case 'test_own/test_step' --perf-update" in reported


def test_another_failure_is_exit_code_1(pytester: pytest.Pytester, run: Run) -> None:
    """If a test fails by itself and a run breaks, the exit code is 1, not 11."""
    bench(pytester, SEVERAL)
    assert run("--benchmark", "--case", "test_own/test_crash").ret == 1


def test_a_missing_library_skips_its_cases(pytester: pytest.Pytester, run: Run) -> None:
    """Without strict, cases of a missing library are skipped; a crash fails, with its traceback and no INTERNALERROR."""
    bench(pytester, SEVERAL.replace("test_plain", "unused"))
    result = run("--benchmark")
    result.assert_outcomes(failed=2, skipped=2)
    result.stdout.fnmatch_lines(
        ["crash in build: it went wrong.", "Traceback: deep inside", "*test_own/test_crash*BROKEN*"]
    )
    result.stdout.no_fnmatch_line("*INTERNALERROR*")


def test_nothing_bad_becomes_a_baseline(pytester: pytest.Pytester, run: Run) -> None:
    """Under --perf-update an invalid and a crashed run still fail, and nothing is written."""
    bench(pytester, SEVERAL)
    chosen = ["--case", "test_own/test_crash", "--case", "test_own/test_invalid", "-k", "not plain"]
    assert run("--benchmark", "--perf-update", "--reason", "hope", *chosen).ret == 1
    assert not (pytester.path / "baselines").exists()


def test_the_numbers_reach_pytest_benchmark(pytester: pytest.Pytester, run: Run) -> None:
    """--benchmark-json holds exactly the recorded samples and the record; a failed run has no entry."""
    bench(pytester, SEVERAL)
    assert run("--benchmark", "-k", "new or invalid or crash", "--benchmark-json=out.json").ret == 1
    content = json.loads((pytester.path / "out.json").read_text())
    [entry] = content["benchmarks"]
    assert entry["stats"]["data"] == list(SAMPLES)
    assert entry["extra_info"]["record"]["metrics"]["peak_bytes"] == {"value": GIB, "unit": "bytes"}
    assert entry["extra_info"]["record"]["verdict"] == "NO_BASELINE"
    assert content["machine_info"]["hpc_core"]["machine"] == "cpu"


def test_pytest_benchmarks_own_gate_works(pytester: pytest.Pytester, run: Run) -> None:
    """--benchmark-save and --benchmark-compare see our samples; --benchmark-disable and --benchmark-skip break nothing."""
    bench(pytester)
    assert run("--benchmark", "--benchmark-save=one").ret == 0
    compared = run("--benchmark", "--benchmark-compare=0001", "--benchmark-compare-fail=median:5%")
    assert compared.ret == 0
    compared.stdout.fnmatch_lines(["*test_step*(0001_one)*"])
    run("--benchmark", "--benchmark-disable").assert_outcomes(skipped=1)
    run("--benchmark", "--benchmark-skip").assert_outcomes(skipped=1)


def test_junit_has_the_verdict_and_the_metrics(pytester: pytest.Pytester, run: Run) -> None:
    """JUnit's XML holds case, verdict and values, and shows a regression as a failure."""
    bench(pytester, STORY.replace("peak={peak}", "peak=2 * GiB, limits=Limits(peak_bytes=GiB)"))
    run("--benchmark", "--junitxml=junit.xml")
    suite = ET.parse(pytester.path / "junit.xml").getroot()[0]
    assert suite.attrib["failures"] == "1"
    reported = {each.attrib["name"]: each.attrib["value"] for each in suite.iter("property")}
    assert (reported["perf_case"], reported["perf_verdict"]) == ("test_own/test_step", "REGRESSED")
    assert reported["perf_metric.peak_bytes"] == str(2 * GIB)


def test_records_are_written_into_a_folder(pytester: pytest.Pytester, run: Run) -> None:
    """--perf-records writes every record, failed ones too, under its case's id."""
    bench(pytester, SEVERAL)
    run("--benchmark", "--perf-records=records", "-k", "new or crash")
    statuses = {
        path.stem: record_from_json(path.read_text()).status for path in pytester.path.rglob("records/*/*.json")
    }
    assert statuses == {"test_new": "ok", "test_crash": "failed"}


def test_a_folder_that_cannot_hold_records_stops_the_run_before_it_begins(pytester: pytest.Pytester, run: Run) -> None:
    """Nothing is measured for records that nobody can write, and the line names the folder."""
    bench(pytester)
    result = run("--benchmark", "--perf-records=/proc/none")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: /proc/none: records cannot be written there: No such file or directory."])


def test_a_disk_that_fills_up_fails_the_case(
    pytester: pytest.Pytester, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record that is lost fails its case with one line that names the file, without a traceback."""

    def full(path: Path, record: Record) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(runner, "write_record", full)
    bench(pytester)
    result = run("--benchmark", "--perf-records=records")
    result.stdout.fnmatch_lines(["*the record cannot be written: *test_step.json: No space left on device."])
    assert "INTERNALERROR" not in result.stdout.str() + result.stderr.str()
    assert "Traceback" not in result.stdout.str()
    assert result.ret == 11


def test_a_full_disk_at_the_end_is_named_in_the_last_line(
    pytester: pytest.Pytester, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a report would say of the pull request is lost: the run says so and is broken."""

    def full(folder: Path, _: object) -> None:
        raise OSError(28, "No space left on device", str(folder / "pull-request.json"))

    monkeypatch.setattr(suite, "write_pull_request", full)
    bench(pytester)
    result = run("--benchmark", "--perf-records=records")
    assert "pull-request.json cannot be written: No space left on device; exit code 11" in result.stdout.lines[-1]
    assert result.ret == 11


def test_a_baseline_of_another_machine_is_not_touched(pytester: pytest.Pytester, run: Run) -> None:
    """The folder of baselines can be elsewhere, and sound baselines are written there."""
    bench(pytester)
    run("--benchmark", "--perf-update", "--reason", "elsewhere", "--perf-baselines=others")
    assert isinstance(find(pytester.path / "others", "cpu", "test_own/test_step"), Baseline)
    assert not (pytester.path / "baselines").exists()


def test_a_run_without_numbers_still_shows_its_failures(pytester: pytest.Pytester, run: Run) -> None:
    """Without any numbers the failure is shown, instead of pytest-benchmark's warning that there is nothing to save."""
    bench(pytester, SEVERAL)

    result = run("--benchmark", "--case", "test_own/test_crash", "--benchmark-json=out.json")

    result.stdout.fnmatch_lines(["FAILED *test_crash*"])
    assert "Not saving anything" not in result.stdout.str() + result.stderr.str()
