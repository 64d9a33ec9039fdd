"""The hooks of a run with `--benchmark`: which tests take part, how they are reported, and how the run ends.

One plugin object, registered only when it is needed.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
import warnings
from collections.abc import Generator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from shlex import quote
from typing import Any, NoReturn

import msgspec
import pytest

from hpc_core.baselines.pull_request import write_pull_request
from hpc_core.case.errors import RepositoryError, SpecError
from hpc_core.case.select import matches, unknown_glob
from hpc_core.gate.exit_code import ExitCode
from hpc_core.gate.verdict import share
from hpc_core.launch.gpu_lock import GpuInUseError, GpuLocks
from hpc_core.plugin import uses_perf
from hpc_core.plugin.cases import CaseFile, Extent, case_id_of, case_of, predicted_gpu, takes_part, tell_apart
from hpc_core.plugin.fixture import CALLED, OUTCOME, Perf, PerfSession, with_timer
from hpc_core.plugin.options import Settings, is_listing, is_whole, spelled
from hpc_core.plugin.outcome import FailureKind, bisect_exit_code, exit_code
from hpc_core.plugin.progress import Progress, duration
from hpc_core.plugin.review import Review
from hpc_core.plugin.runner import Runner
from hpc_core.plugin.tally import Tally
from hpc_core.record.environment import machine, stack, visible_gpus
from hpc_core.record.git import top
from hpc_core.record.record import Record
from hpc_core.record.repeats import word_of
from hpc_core.record.units import counted
from hpc_core.record.version import __version__
from hpc_core.report.command import Command
from hpc_core.report.terminal import render

NAME = "hpc-core-suite"
_NO_GPU = "needs a CUDA GPU: none is visible"
_OUTCOMES = (pytest.fail.Exception, pytest.skip.Exception)
_UNUSED = "ignore:Benchmark fixture was not used at all"


def _write_lines(reporter: pytest.TerminalReporter, text: str) -> None:
    """Write a text line by line: on a terminal that lacks a character, pytest escapes all that is written at once, line ends too."""
    for line in text.split("\n"):
        reporter.write_line(line)


class Suite:
    """The hooks of a run with `--benchmark`."""

    def __init__(self, config: pytest.Config, settings: Settings) -> None:
        self._config = config
        self._settings = settings
        self._locks = GpuLocks()
        self._failure_kinds: list[FailureKind] = []
        self._plain = False
        self._measured: frozenset[str] = frozenset()
        """Ids of the collected cases that are measured."""
        self._on_request = 0
        """Tests of this scale that are left out because nobody asked for them."""
        self._tally = Tally([Path(path.partition("::")[0]) for path in settings.paths])
        self.decided: int | None = None
        """The exit code, once the session has ended."""
        self._progress = Progress(ticking=settings.way != "inline")
        self._review = Review(settings)
        self._runner = Runner(settings, self._progress, self._review)
        self.session = PerfSession(self._runner)
        self._exit, self._pid = os._exit, os.getpid()
        os._exit = self._end_of_process

    def _end_of_process(self, status: int) -> NoReturn:
        """Stand in for `os._exit`: code under test that calls it with 0 in this process would end the run green, without a row."""
        if os.getpid() == self._pid and not status:
            capture: Any = self._config.pluginmanager.get_plugin("capturemanager")
            if capture is not None:
                capture.suspend(in_=True)
            sys.stderr.write("\nhpc-core: a test ended this process by os._exit(0), before the run was over.\n")
            sys.stderr.flush()
            status = ExitCode.BROKEN
        self._exit(status)

    def perf(self, item: pytest.Item, benchmark: Any) -> Perf:
        """Return the fixture's value for one test."""
        return Perf(item, benchmark, self._runner, strict=self._settings.strict, command=self._command(item))

    def _command(self, item: pytest.Item) -> Command:
        """Return the commands that run and accept only this case."""
        # A file that pytest only collects when it is named, such as bench/studies/original_report/original_report.py, must be named here too.
        own = self._is_found(item.path) and any(item.path.is_relative_to(path) for path in self._settings.paths)
        given = item.path.resolve() in self._settings.case_files
        path = f" {quote(self._short(item.path))}"
        if own and predicted_gpu(item) is None:
            path = ""
        elif given and predicted_gpu(item) is None:
            path = f" {spelled(self._config, '--cases')}{path}"
        where = self._config.getoption("perf_baselines")
        return Command(
            case=case_id_of(item),
            start=f"{_program()} {spelled(self._config, '--benchmark')}{path}",
            options=f" --perf-baselines={quote(where)}" if where else "",
            folder=self._folder,
            fault=self._settings.fault,
            case_option=spelled(self._config, "--case"),
            reason_option=spelled(self._config, "--reason"),
        )

    @functools.cached_property
    def _folder(self) -> str:
        """The folder that pytest was started in, below the root of its repository; empty if it is the root, or in none."""
        here = self._config.invocation_params.dir.resolve()
        try:
            below = here.relative_to(top(here).resolve()).as_posix()
        except (RepositoryError, ValueError):
            return ""
        return "" if below == "." else below

    def _is_found(self, path: Path) -> bool:
        """Return whether pytest collects a file of this name by itself."""
        return any(fnmatchcase(path.name, pattern) for pattern in self._config.getini("python_files"))

    def _short(self, path: Path) -> str:
        here = self._config.invocation_params.dir
        return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)

    def pytest_sessionstart(self) -> None:
        """Choose how progress is shown: a live line on a terminal, a line per case elsewhere, nothing with -q."""
        reporter = self._config.pluginmanager.get_plugin("terminalreporter")
        if reporter is None or self._config.get_verbosity() < 0:
            return
        if reporter.isatty:
            # Descriptor 1 is still the terminal: capture begins with the first collected file.
            self._progress.show_on(1)
        self._plain = not reporter.isatty and self._config.get_verbosity() == 0

    def pytest_report_header(self) -> str:
        """Return the header: scale, baselines, and how workers are started."""
        settings = self._settings
        what = f"scale {settings.scale or 'any'} ({settings.why_scale})"
        fault = f", fault {settings.fault}" if settings.fault else ""
        where = f"baselines {self._short(settings.baselines)}"
        predict = "" if settings.predict == "off" else f", predictions: {settings.predict}"
        strict = f", strict ({settings.why_strict})" if settings.strict else ""
        return f"hpc-core: {__version__}, {what}{predict}, {where}, {settings.way}{fault}{strict}"

    def pytest_collect_file(self, file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
        """Collect a case file below a folder that also runs: pytest 9 drops such a file from its arguments."""
        own = file_path.resolve() in self._settings.case_files
        if not own or parent.session.isinitpath(file_path) or self._is_found(file_path):
            return None  # not a case file, or one that pytest collects by itself
        return self.pytest_pycollect_makemodule(file_path, parent)

    def pytest_pycollect_makemodule(self, module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
        """Collect a case file as a test module whose tests are its cases."""
        if module_path.resolve() not in self._settings.case_files:
            return None
        module: pytest.Module = CaseFile.from_parent(parent, path=module_path)
        return module

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Keep the chosen tests, and give each of them its timer."""
        taking_part = [item for item in items if uses_perf(item)]
        ids = [case_id_of(item) for item in taking_part]
        if is_whole(config):
            self._review.known = {case_id_of(item): item.path for item in taking_part}
            measured = [item for item in taking_part if predicted_gpu(item) is None]
            self._review.of_other_scale = frozenset(
                case_id_of(item) for item in measured if not self._of_this_scale(item)
            )
        for glob in self._settings.globs:
            if not any(matches(case_id, [glob]) for case_id in ids):
                raise pytest.UsageError(f"--case {unknown_glob(glob, ids)}")
        self._measured = frozenset(case_id_of(item) for item in taking_part if predicted_gpu(item) is None)
        settings = self._settings
        dropped = [item for item in taking_part if not self._is_chosen(item, settings.scale, settings.predict)]
        self._tally.silenced = self._silenced(dropped)
        self._on_request = sum(self._waits_for_request(item) and self._of_this_scale(item) for item in dropped)
        self._tally.on_request = self._on_request
        _refuse_duplicates([item for item in taking_part if item not in dropped])
        if dropped:
            gone = set(dropped)
            config.hook.pytest_deselected(items=dropped)
            items[:] = [item for item in items if item not in gone]
        self._tally.choose(items)
        for item in items:
            if uses_perf(item):
                _prepare(item)

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        """Expect no numbers of cases that were deselected."""
        self._tally.deselect(items)

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
        """Tell apart the tests of one module or class whose ids would be equal."""
        report = yield
        call = getattr(report, "call", None)
        if report.passed:
            tell_apart(report.result)
        elif report.failed and call is not None and (text := _mistake(call.excinfo)):
            report.longrepr = text
        return report

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Note files that skip themselves."""
        self._tally.note_file(self._config.rootpath / report.nodeid.partition("::")[0], report)

    def _is_chosen(self, item: pytest.Item, scale: str | None, predict: Extent) -> bool:
        if not matches(case_id_of(item), self._settings.globs):
            return False
        if predicted_gpu(item) is not None:
            return takes_part(item, predict) and not self._runs_here(item)
        return _is_of_scale(item, scale) and not self._waits_for_request(item)

    def _silenced(self, dropped: Sequence[pytest.Item]) -> tuple[str, ...]:
        """Return what settings or PYTEST_ADDOPTS leave out, and with which option; the command line may choose what it likes."""
        settings = self._settings
        left_out = [item for item in dropped if self._is_chosen(item, settings.own_scale, settings.own_predict)]
        predictions = sum(predicted_gpu(item) is not None for item in left_out)
        cases, found = len(left_out) - predictions, []
        by_scale = f"--perf-scale={settings.scale}"
        if cases:
            found.append(f"{counted(cases, 'case')} left out by {by_scale}")
        if predictions:
            is_given = self._config.getoption("perf_predict") is not None
            by = f"--perf-predict={settings.predict}" if is_given else by_scale
            found.append(f"{counted(predictions, 'prediction')} left out by {by}")
        return tuple(f"{each} in settings or PYTEST_ADDOPTS" for each in found)

    def _of_this_scale(self, item: pytest.Item) -> bool:
        return _is_of_scale(item, self._settings.scale)

    def _runs_here(self, item: pytest.Item) -> bool:
        """Return whether a prediction that only `--perf-case` chose is of a case that a GPU of this machine runs."""
        unasked = self._config.getoption("perf_predict") is None
        return unasked and bool(visible_gpus()) and case_id_of(item) in self._measured

    def _waits_for_request(self, item: pytest.Item) -> bool:
        """Return whether a test that is marked perf_on_request was not asked for: by `--perf-all`, its case or its file.

        A test that needs a GPU does not wait where none is visible: it is skipped, and the reason is shown.
        """
        asked_for = self._settings.all or self._settings.globs or item.session.isinitpath(item.path)
        waits = item.get_closest_marker("perf_on_request") is not None and not asked_for
        return waits and (item.get_closest_marker("perf_gpu") is None or bool(visible_gpus()))

    def pytest_report_collectionfinish(self) -> list[str]:
        """Say how many tests of this machine wait for a request."""
        if not self._on_request:
            return []
        ways = f"{spelled(self._config, '--all')}, {spelled(self._config, '--case')} or their file"
        return [f"hpc-core: {self._on_request} more on request, by {ways}"]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Count what will run, and divide the suite's false alarms over the cases. A case divides its share over its metrics."""
        self._tally.collected(session.items)
        self._progress.total = sum(
            uses_perf(item) and item.get_closest_marker("skip") is None for item in session.items
        )
        measured = [item for item in session.items if uses_perf(item) and predicted_gpu(item) is None]
        self._runner.expect([case for item in measured if (case := case_of(item)) is not None])
        # A prediction has no time that an interval could judge. Measured cases without one leave their share unused.
        self._runner.alpha = share(
            sum(
                uses_perf(item) and item.get_closest_marker("skip") is None and predicted_gpu(item) is None
                for item in session.items
            )
        )

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> None:
        """Lock the GPUs before the first test."""
        if self._progress.total and not session.config.option.collectonly:
            try:
                self._locks.take(visible_gpus())
            except GpuInUseError as error:
                raise pytest.UsageError(str(error)) from error

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        """Apply the outcome of a test that had nothing to compare with, once its own assertions have passed."""
        try:
            result = yield
        finally:
            item.stash[CALLED] = True
        outcome = item.stash.get(OUTCOME, None)
        if outcome is not None:
            outcome.apply()
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note how a test went."""
        self._tally.note(report)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Record why a test failed, and report a skip at the test's line instead of the plugin's."""
        report = yield
        outcome = item.stash.get(OUTCOME, None)
        raised = None if call.excinfo is None else call.excinfo.value
        ours = outcome is not None and isinstance(raised, _OUTCOMES) and raised.msg == outcome.text
        if report.failed:
            self._failure_kinds.append(outcome.kind if ours and outcome is not None else "other")
            report.longrepr = _mistake(call.excinfo) or report.longrepr
        if report.skipped and ours and outcome is not None:
            path, line, _ = item.location
            report.longrepr = (path, (line or 0) + 1, f"Skipped: {outcome.text}")
        if call.when == "call" and uses_perf(item) and self._plain and self._runner.rows:
            self._print_row(item)
        return report

    def _print_row(self, item: pytest.Item) -> None:
        """Print one line for a case where there is no terminal."""
        row = self._runner.rows[-1]
        if row.case != case_id_of(item):
            return
        reporter = self._config.pluginmanager.get_plugin("terminalreporter")
        assert reporter is not None
        headline = row.judgement.headline if row.judgement is not None and row.acceptance is None else ""
        took = _took(row.record)
        reporter.ensure_newline()
        reporter.write_line(f"  [{self._progress.count}] {row.case}  {row.verdict}  {took}  {headline}".rstrip())

    def pytest_report_teststatus(self, report: pytest.CollectReport | pytest.TestReport) -> tuple[str, str, str] | None:
        """Print no letter for a test that has its own line."""
        if (
            not self._plain
            or report.when != "call"
            or not dict(getattr(report, "user_properties", ())).get("perf_case")
        ):
            return None
        return report.outcome, "", report.outcome.upper()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> Generator[None, object, object]:
        """End all processes, choose the exit code (worse, broken or not comparable), and print the last line.

        Runs around the hooks of pytest's reporter and of pytest-benchmark. Without any numbers that hook warns that there is nothing to save. In a project
        that turns warnings into errors, this would be a traceback that hides the failures.
        """
        warnings.filterwarnings("ignore", message="Not saving anything, no benchmarks have been run")
        try:
            return (yield)
        finally:
            self._runner.close()
            self._locks.release()
            self._tally.without_test = self._review.without_test(self._runner.rows, self._tally.deselected)
            lost = self._lost_pull_request()
            self.decided = session.exitstatus = self._exit_code(exitstatus) or (ExitCode.BROKEN if lost else 0)
            self._print_tally(exitstatus, lost)

    def _lost_pull_request(self) -> str:
        """Write what a report says of a pull request next to the records; return why that is not possible, or nothing."""
        if self._settings.records is not None and self._runner.rows:
            try:
                write_pull_request(self._settings.records, self._review.pull_request(self._runner.rows))
            except OSError as error:
                return f"; {error.filename} cannot be written: {error.strerror}"
        return ""

    def _exit_code(self, exitstatus: int) -> int:
        """Return the code for a session that pytest would end with this one. What pytest calls an error stays so."""
        ran = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
        kinds = [] if exitstatus == pytest.ExitCode.OK else self._failure_kinds
        if ran and self._settings.strict and not is_listing(self._config):
            kinds = [*kinds, *self._tally.kinds(self.session.jobs)]
        if self._settings.bisect:
            return bisect_exit_code(exitstatus, kinds)
        if ran and kinds:
            return exit_code(kinds)
        if exitstatus == pytest.ExitCode.OK and self._review.expired():
            return pytest.ExitCode.TESTS_FAILED
        return exitstatus

    def _print_tally(self, exitstatus: int, lost: str) -> None:
        """Print the last line: what was measured, what was not, and why; and what makes the exit code differ from pytest's."""
        reporter = self._config.pluginmanager.get_plugin("terminalreporter")
        if reporter is None or self._config.option.collectonly:
            return
        code = f"; exit code {self.decided}" if self.decided else ""
        strict = f" ({self._settings.why_strict})" if self._settings.strict and self.decided != exitstatus else ""
        reporter.ensure_newline()
        reporter.write_line(f"{self._tally.line(self._runner.rows)}{lost}{code}{strict}")

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_unconfigure(self) -> Generator[None, object, object]:
        """End all processes of a session that never began or never finished. Let no other hook end the process green."""
        try:
            return (yield)
        except SystemExit as error:
            if error.code or not self.decided:
                raise
            raise SystemExit(self.decided) from error
        finally:
            self._end()

    def _end(self) -> None:
        os._exit = self._exit
        self._runner.close()
        self._locks.release()

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> Generator[None, object, object]:
        """Print our table after pytest-benchmark's."""
        try:
            result = yield
        finally:
            if self._runner.rows:
                width = shutil.get_terminal_size().columns
                terminalreporter.section("hpc-core", sep="=")
                text = render(self._runner.rows, width=width, color=bool(terminalreporter.hasmarkup))
                _write_lines(terminalreporter, text)
            if self._runner.earlier is not None and self._runner.earlier.notes:
                terminalreporter.section("resumed", sep="=")
                _write_lines(terminalreporter, "\n".join(self._runner.earlier.notes))
            for title, text in [*self._review.sections(self._runner.rows), *self.session.shown]:
                terminalreporter.section(title, sep="=")
                _write_lines(terminalreporter, text)
        return result

    @pytest.hookimpl(optionalhook=True)
    def pytest_benchmark_update_json(self, output_json: dict[str, Any]) -> None:
        """Add what the pull request loosens to pytest-benchmark's file."""
        found = self._review.pull_request(self._runner.rows)
        if found is not None:
            output_json["hpc_core"] = msgspec.to_builtins(found)

    @pytest.hookimpl(optionalhook=True)
    def pytest_benchmark_update_machine_info(self, machine_info: dict[str, Any]) -> None:
        """Add machine and stack to pytest-benchmark's facts; nothing that changes from run to run."""
        device = "cuda" if visible_gpus() else "cpu"
        where = machine("cuda" if device == "cuda" else "cpu")
        machine_info["hpc_core"] = {
            "version": __version__,
            "machine": where.key,
            "name": where.name,
            "stack": stack("cuda" if device == "cuda" else "cpu"),
        }


def _program() -> str:
    """Return what starts this pytest in the user's shell: its name, if that is found there, or Python and its module."""
    python = Path(sys.executable)
    found = shutil.which("pytest")
    if found is not None and Path(found).parent == python.parent:
        return "pytest"
    shown = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python
    return f"{quote(str(shown))} -m pytest"


def _took(record: Record) -> str:
    """Return how long the case's processes, or passes in this process, took, and how many there were if more than one."""
    processes = record.processes
    if not processes:
        return duration(sum(record.circumstances.phase_s.values()))
    return f"{duration(sum(process.seconds for process in processes))} in {len(processes)} {word_of(record)}es"


def _is_of_scale(item: pytest.Item, chosen: str | None) -> bool:
    """Return whether a test is of the chosen scale. One with a step of its own is of every scale, or of the full one if it needs a GPU."""
    case = case_of(item)
    scale = case.scale if case is not None else "full" if item.get_closest_marker("perf_gpu") else None
    return scale is None or chosen in (None, scale)


def _mistake(raised: pytest.ExceptionInfo[BaseException] | None) -> str:
    """Return a mistake in a case or limit as one line, with its place in the user's file; empty if it is something else."""
    if raised is None or not isinstance(raised.value, SpecError):
        return ""
    ours = Path(__file__).parent.parent
    place = next((entry for entry in reversed(raised.traceback) if ours not in Path(entry.path).parents), None)
    where = "" if place is None else f"{Path(place.path).name}:{place.lineno + 1}: "
    return f"{where}{raised.value}"


def _refuse_duplicates(items: list[pytest.Item]) -> None:
    seen: dict[tuple[str, str | None], str] = {}
    for item in items:
        other = seen.setdefault((case_id_of(item), predicted_gpu(item)), item.nodeid)
        if other != item.nodeid:
            raise pytest.UsageError(
                f"two tests share the case {case_id_of(item)!r}, and so its baseline: {other} and {item.nodeid}. "
                "Rename one of them."
            )


def _prepare(item: pytest.Item) -> None:
    case = case_of(item)
    with_timer(item, f"{case.scale} {case.kind}" if case is not None else case_id_of(item).partition("/")[0])
    # A case that fails before it has samples leaves pytest-benchmark's fixture unused; it should not warn about that.
    item.add_marker(pytest.mark.filterwarnings(_UNUSED))
    if item.get_closest_marker("perf_gpu") is not None and not visible_gpus():
        item.add_marker(pytest.mark.skip(reason=_NO_GPU))
