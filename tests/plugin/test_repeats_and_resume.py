"""How many processes a case gets, which records of an earlier run are reused, and the options for both."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_core.plugin import resume
from hpc_core.plugin.repeats import MOST, Plan, narrow, replicated
from hpc_core.plugin.resume import Earlier
from hpc_core.record import environment
from hpc_core.record.job import Job, Retime
from hpc_core.record.record import Metric, Record, record_from_json, record_to_json
from tests.plugin.scripted_launcher import ScriptedLauncher
from tests.plugin.scripted_project import Run, scripted_project
from tests.strategies import a_case, a_record


def timed(value: float) -> Record:
    """A record with this busy time."""
    busy = Metric(value=value, unit="s", noise="busy", better="lower", depends_on=("case", "stack", "machine"))
    return a_record({"busy_s": busy})


class Processes:
    """Further processes with these busy times; the last one repeats. Each takes ten seconds of the clock."""

    def __init__(self, *values: float) -> None:
        self._values = values
        self.started: list[tuple[int, int]] = []

    def __call__(self, number: int, total: int) -> Record:
        """Return the record of the next process."""
        self.started.append((number, total))
        return timed(self._values[min(len(self.started), len(self._values)) - 1])

    def clock(self) -> float:
        """The seconds since the first process."""
        return 10.0 * len(self.started)


def repeated(first: Record, plan: Plan, *values: float) -> tuple[Record, list[tuple[int, int]]]:
    """Return the record after all planned processes, and the numbers of those that ran."""
    more = Processes(*values)
    return replicated(first, more, plan, clock=more.clock), more.started


def test_three_on_a_gpu_and_one_elsewhere() -> None:
    """A case with busy time runs in three processes by default, another in one."""
    record, numbers = repeated(timed(1.0), Plan(), 3.0, 2.0)
    assert (record.metrics["busy_s"].samples, numbers) == ((1.0, 3.0, 2.0), [(2, 3), (3, 3)])
    on_cpu = a_record({"peak_bytes": a_record().metrics["peak_bytes"]})
    assert repeated(on_cpu, Plan(), 1.0) == (on_cpu, [])


@given(st.integers(1, MOST), st.integers(1, MOST))
def test_a_fixed_number_includes_earlier_processes(wanted: int, before: int) -> None:
    """The number is the total, with the processes of an earlier run."""
    plan = Plan(processes=wanted)
    first = repeated(timed(1.0), Plan(processes=before), 1.0)[0]
    record, numbers = repeated(first, plan, 2.0)
    assert len(numbers) == max(0, wanted - before)
    assert max(1, len(record.processes)) == max(wanted, before)


def test_a_budget_lets_wide_times_have_more_processes() -> None:
    """With a budget, processes are added until their times lie close together."""
    spread = (1.01, 1.0, 1.01, 1.0, 1.0)
    assert len(repeated(timed(1.0), Plan(), *spread)[1]) == 2
    assert len(repeated(timed(1.0), Plan(budget_s=1000.0), *spread)[1]) == MOST - 1
    assert len(repeated(timed(1.0), Plan(budget_s=1000.0), 1.001, 1.002)[1]) == 2


def test_a_spent_budget_is_reported() -> None:
    """No process starts once the budget is spent, and a note says how many of the planned ones ran."""
    record, numbers = repeated(timed(1.0), Plan(processes=5, budget_s=20.0), 1.0)
    assert numbers == [(2, 5), (3, 5)]
    assert record.circumstances.notes[0].startswith("the time budget ended after 3 of 5 processes of tiny/lora")


def test_a_broken_case_has_no_further_process() -> None:
    """A case whose first process is invalid has no further process."""
    void = a_record(status="invalid", reasons=("It ran unquantized.",))
    assert repeated(void, Plan(processes=5), 1.0) == (void, [])


@pytest.mark.parametrize(
    ("values", "enough"),
    [
        ((1.0,), False),
        ((1.0, 1.0), False),  # two that agree may do so by chance
        ((1.0, 1.0, 1.0), True),
        ((1.0, 1.001, 1.004), True),
        ((1.0, 1.001, 1.006), False),
        ((0.0011, 0.0011, 0.00111), False),  # relative, not in seconds
    ],
)
def test_times_are_narrow_within_a_quarter_of_a_percent(values: tuple[float, ...], enough: bool) -> None:
    """Half the range of at least three processes may be 0.25 % of their median."""
    assert narrow(values) is enough


def commit_all(folder: Path) -> None:
    """Make a folder a git repository with one commit of its files."""
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", *command], cwd=folder, check=True)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository with one file of code, as the working folder."""
    (tmp_path / "code.py").write_text("x = 1\n")
    commit_all(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resume, "_imported_from", list)  # hpc-core itself need not be a checkout
    return tmp_path


def write_record(folder: Path, **changes: Any) -> Record:
    """Write a record of the current code into `folder`, as an earlier run would."""
    seen = environment.circumstances("cpu", "warm")
    record = a_record(circumstances=msgspec.structs.replace(seen, **changes))
    path = folder / f"{record.case.id}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    run = earlier(folder)
    run.record(record.case, "cpu")
    path.write_bytes(record_to_json(record))
    run.keep(record.case.id)
    return record


def earlier(folder: Path, **named: Any) -> Earlier:
    return Earlier(folder, Plan(processes=1), ignoring=[Path("baselines"), Path("junit.xml")], **named)


def test_a_record_of_the_same_code_is_reused(repository: Path) -> None:
    """A record of the same case, code, stack and machine replaces a run, and a note says so."""
    record = write_record(repository / "records")
    (repository / "records" / "junk.py").write_text("")
    (repository / "baselines").mkdir()
    (repository / "baselines" / "accepted.py").write_text("")
    (repository / "junit.xml").write_text("a report of pytest's")
    (repository / "__pycache__").mkdir()
    (repository / "__pycache__" / "code.pyc").write_text("")
    again = earlier(repository / "records")
    assert again.record(record.case, "cpu") == record
    assert again.notes == [
        f"tiny/lora reused from {repository}/records/tiny/lora.json, measured at {record.circumstances.started_at}"
    ]
    assert again.record(a_case("tiny/other"), "cpu") is None
    assert len(again.notes) == 1  # a case without a record needs no note


@pytest.mark.parametrize(
    ("changes", "named", "why"),
    [
        ({"commit": "0123abc"}, {}, "it was measured at commit 0123abc, this is"),
        ({"stack": {"torch": "1.0"}}, {}, "torch, .*changed since"),
        ({"machine": a_record().circumstances.machine}, {}, "it was measured on nvidia-h100"),
        ({}, {"fault": "rank"}, "the earlier run had the fault None, this one has rank"),
    ],
)
def test_a_record_of_anything_else_is_not_reused(
    repository: Path, changes: dict[str, Any], named: dict[str, Any], why: str
) -> None:
    """A record of another commit, stack, machine or fault is not reused, and a note says why."""
    record = write_record(repository / "records", **changes)
    again = earlier(repository / "records", **named)
    assert again.record(record.case, "cpu") is None
    assert again.notes[0].startswith("tiny/lora runs again: ")
    assert re.search(why, again.notes[0]), again.notes


@pytest.mark.parametrize("name", ["code.py", "new.py", "settings.json", "deep/run.yaml", "native.so", "log.txt"])
def test_every_file_that_is_not_committed_counts(repository: Path, name: str) -> None:
    """A changed file and a new one invalidate earlier records, and are named; a record of the same change is reused."""
    record = write_record(repository / "records")
    (repository / name).parent.mkdir(exist_ok=True)
    (repository / name).write_text("x = 2\n")
    again = earlier(repository / "records")
    assert again.record(record.case, "cpu") is None
    assert again.notes == [f"tiny/lora runs again: changed since it was measured: {repository / name}"]
    write_record(repository / "records")
    assert earlier(repository / "records").record(record.case, "cpu") is not None


def test_the_whole_repository_counts(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run in a subfolder sees changes next to it, above it, and in a repository inside."""
    (repository / "below").mkdir()
    inside = repository / "vendored"
    inside.mkdir()
    (inside / "code.py").write_text("x = 1\n")
    commit_all(inside)
    monkeypatch.chdir(repository / "below")
    for changed in (repository / "code.py", inside / "code.py"):
        record = write_record(repository / "records")
        changed.write_text(f"{changed.read_text()}x = 3\n")
        assert earlier(repository / "records").record(record.case, "cpu") is None


def test_a_compiled_module_counts_although_git_ignores_it(repository: Path) -> None:
    """An extension that is built in place is code; one installed in an environment has a version."""
    (repository / ".gitignore").write_text("*.so\nvenv/\n")
    for name in ("native.so", "venv/lib/site-packages/other.so"):
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_text("1")
    record = write_record(repository / "records")
    (repository / "venv/lib/site-packages/other.so").write_text("22")
    assert earlier(repository / "records").record(record.case, "cpu") is not None
    (repository / "native.so").write_text("22")
    assert earlier(repository / "records").record(record.case, "cpu") is None


def test_code_outside_the_repository_counts(
    repository: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every import path belongs to the code; one without git cannot be compared, so nothing is resumed."""
    monkeypatch.undo()
    monkeypatch.chdir(repository)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "helper.py").write_text("x = 1\n")
    monkeypatch.setattr(sys, "path", [str(elsewhere), *(path for path in sys.path if "site-packages" in path)])
    monkeypatch.setattr(resume, "_editable", list)
    with pytest.raises(pytest.UsageError, match=f"--perf-resume: nobody can tell .*{elsewhere}.*git init"):
        earlier(repository / "records")
    commit_all(elsewhere)
    record = write_record(repository / "records")
    assert earlier(repository / "records").record(record.case, "cpu") is not None
    (elsewhere / "helper.py").write_text("x = 2\n")
    assert earlier(repository / "records").record(record.case, "cpu") is None


def test_a_package_that_is_not_in_the_stack_counts(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version or another build of any package invalidates a record."""
    record = write_record(repository / "records")
    installed = resume._installed()
    monkeypatch.setattr(resume, "_installed", lambda: installed | {"package numpy": "another build"})
    again = earlier(repository / "records")
    assert again.record(record.case, "cpu") is None
    assert "changed since it was measured: package numpy" in again.notes[0]


def test_code_that_changes_while_a_case_runs_leaves_no_record_to_resume(repository: Path) -> None:
    """A record of a case whose code changed while it ran is not reused."""
    record = write_record(repository / "records")
    run = earlier(repository / "records")
    assert run.record(record.case, "cpu") is not None
    (repository / "code.py").write_text("x = 2\n")
    run.keep(record.case.id)
    (repository / "code.py").write_text("x = 1\n")
    again = earlier(repository / "records")
    assert again.record(record.case, "cpu") is None
    assert "does not say which code" in again.notes[0]


def test_a_damaged_record_runs_again(repository: Path) -> None:
    """A truncated record makes the case run again, without a traceback."""
    record = write_record(repository / "records")
    path = repository / "records" / "tiny" / "lora.json"
    path.write_bytes(path.read_bytes()[:100])
    again = earlier(repository / "records")
    assert again.record(record.case, "cpu") is None
    assert "is not a record" in again.notes[0]


@pytest.mark.parametrize("is_repository", [False, True])
def test_code_that_nobody_can_identify_is_not_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_repository: bool
) -> None:
    """Outside a repository, and in one without a commit, the option is refused; HPC_CORE_COMMIT cannot see an edited copy."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HPC_CORE_COMMIT", "0123abc")
    if is_repository:
        subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    with pytest.raises(pytest.UsageError, match=r"--perf-resume: nobody can tell .*git init && git add"):
        earlier(tmp_path / "records")


class BusyLauncher(ScriptedLauncher):
    """Gives each process its own busy time, and further processes another number of kernels if scripted."""

    jobs: list[Job] = []
    busy_s = 1.0

    def run(self, job: Job) -> Record:
        """Return the scripted record, with busy time."""
        BusyLauncher.jobs.append(job)
        record = super().run(job)
        if record.status != "ok":
            return record
        arguments: dict[str, Any] = job.case.workload.arguments  # type: ignore[union-attr]
        kernels = arguments.get("kernels", 100) if isinstance(job.kind, Retime) else 100
        count = msgspec.structs.replace(record.metrics["operators"], value=kernels)
        busy = timed(self.busy_s + len(BusyLauncher.jobs) / 1000).metrics["busy_s"]
        return msgspec.structs.replace(record, metrics=record.metrics | {"busy_s": busy, "kernels": count})


STORY = 'def test_step(perf):\n    perf("scripted:step", {arguments})\n'


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a project of one case with scripted workers."""
    BusyLauncher.jobs = []
    run_pytest = scripted_project(pytester, monkeypatch, launcher=BusyLauncher)

    def run_case(*options: str, arguments: str = "") -> pytest.RunResult:
        (pytester.path / "bench" / "test_own.py").write_text(STORY.format(arguments=arguments))
        return run_pytest("--benchmark", *options)

    return run_case


def test_a_run_measures_in_several_processes_and_accepts_them(pytester: pytest.Pytester, run: Run) -> None:
    """A case with busy time is measured once in full and twice briefly, and the history keeps every sample."""
    run("--perf-update", "--reason", "first").assert_outcomes(passed=1)
    assert [isinstance(job.kind, Retime) for job in BusyLauncher.jobs] == [False, True, True]
    history = pytester.path / "baselines" / "cpu" / "test_own" / "test_step.history.jsonl"
    record = record_from_json(history.read_text())
    assert record.metrics["busy_s"].samples == (1.001, 1.002, 1.003)
    assert (record.metrics["busy_s"].value, len(record.processes)) == (1.002, 3)


def test_one_process_decides_if_it_passes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A case whose busy time passes in its first process gets no further ones; one that does not gets three."""
    run("--perf-update", "--reason", "first")
    BusyLauncher.jobs.clear()
    run().assert_outcomes(passed=1)
    assert len(BusyLauncher.jobs) == 1
    BusyLauncher.jobs.clear()
    monkeypatch.setattr(BusyLauncher, "busy_s", 1.1)
    run().assert_outcomes(failed=1)
    assert len(BusyLauncher.jobs) == 3


def test_counts_that_differ_between_processes_fail_the_case(run: Run) -> None:
    """An extra kernel in a further process is INVALID, with both numbers, and ends the repeats."""
    result = run(arguments="kernels=101")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*kernels is 100 in process 1 and 101 in process 2 of the same case*"])
    assert len(BusyLauncher.jobs) == 2


def test_a_second_run_adds_the_missing_processes(
    pytester: pytest.Pytester, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --perf-resume the second run adds only the missing processes, and says where the others came from."""
    monkeypatch.setattr(resume.Earlier, "_moved", lambda self, found, case, device: None)
    monkeypatch.setattr(resume, "_imported_from", list)
    commit_all(pytester.path)
    run("--perf-resume=left", "--perf-processes=2")
    assert len(BusyLauncher.jobs) == 2
    result = run("--perf-resume=left", "--perf-processes=4")
    assert [isinstance(job.kind, Retime) for job in BusyLauncher.jobs] == [False, True, True, True]
    result.stdout.fnmatch_lines(
        ["*= resumed =*", "test_own/test_step reused from *left/test_own/test_step.json, measured at *"]
    )
    record = record_from_json((pytester.path / "left" / "test_own" / "test_step.json").read_text())
    assert len(record.processes) == 4


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--perf-processes=0",), "--perf-processes: expected a number from 1 to 12, or auto, got '0'"),
        (("--perf-processes=many",), "got 'many'"),
        (("--perf-processes=2", "--perf-inline"), "an inline run has one process"),
        (("--perf-budget=0",), "--perf-budget: expected minutes above 0, got '0'"),
        (("--perf-budget=inf",), "got 'inf'"),
        (("--perf-budget=soon",), "got 'soon'"),
        (("--perf-records=a", "--perf-resume=b"), "both name the folder of records"),
    ],
)
def test_wrong_options_are_refused(run: Run, options: tuple[str, ...], expected: str) -> None:
    """A wrong option gives one line and exit code 4, and nothing runs."""
    result = run(*options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert expected in str(result.stderr)
    assert BusyLauncher.jobs == []
