"""The command line, the ini file and the file of waivers, read once into one frozen value."""

from __future__ import annotations

import importlib
import math
import os
import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Literal, cast

import msgspec
import pytest

from hpc_core.baselines.accept import why_without_commit
from hpc_core.case.errors import SpecError
from hpc_core.case.select import load_case_file
from hpc_core.gate.waivers import Waiver, waivers_from_toml
from hpc_core.plugin.base import BASELINES, WAIVERS, Rules, pytest_settings, settings_above
from hpc_core.plugin.cases import Extent, root_of
from hpc_core.plugin.repeats import MOST
from hpc_core.record.environment import commit, named_commit, visible_gpus
from hpc_core.record.files import read_regular
from hpc_core.record.git import changed_code
from hpc_core.record.job import Way

ACTIVE = "perf_active"
"""Where pytest keeps `--benchmark`."""
_SHORT = {
    "--all": "--perf-all",
    "--benchmark": "--perf-benchmark",
    "--case": "--perf-case",
    "--cases": "--perf-cases",
    "--reason": "--perf-reason",
}
"""Options that have a short name too, where nobody else has it."""
_SPELLED = pytest.StashKey[dict[str, str]]()
"""The short names that are ours in this run."""
_SCALES = ("tiny", "small", "full", "auto")
_LISTING = frozenset({
    "--collect-only", "--collectonly", "--co", "--setup-plan", "--setup-only", "--fixtures", "--funcargs",
    "--fixtures-per-test", "--markers", "--help", "-h", "--version", "-V", "--cache-show",
})  # fmt: skip
_MOST_NAMES = 3
"""Uncommitted files that a refusal names."""
_CHOOSING = (
    "--perf-case", "--case", "-k", "-m", "--deselect", "--ignore", "--ignore-glob", "--lf", "--last-failed", "--sw", "--stepwise",
)  # fmt: skip
"""Options that leave out tests or files."""
_EXTENT = ("perf_scale", "perf_predict")
"""Options that decide how much of the suite runs."""
_GPU_WORD = re.compile(r"\bperf_gpu\b")


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The options of a run. They do not contradict each other."""

    scale: Literal["tiny", "small", "full"] | None
    """None: every scale."""
    why_scale: str
    """Why this scale was chosen, for the header."""
    globs: tuple[str, ...]
    all: bool
    """Whether tests that are marked perf_on_request run too."""
    update: bool
    reason: str
    baselines: Path
    strict: bool
    why_strict: str
    """What makes it strict; empty if it is not."""
    way: Way
    records: Path | None
    resume: Path | None
    """The folder of records of an earlier run."""
    processes: int | Literal["auto"]
    budget_s: float | None
    case_files: tuple[Path, ...]
    fault: str | None
    predict: Extent
    """Which predictions are made."""
    own_scale: Literal["tiny", "small", "full"] | None
    own_predict: Extent
    """Scale and predictions as they would be if only the command line chose them, not settings or PYTEST_ADDOPTS."""
    paths: tuple[str, ...]
    """The folders that `--benchmark` runs when no path is given."""
    allow_dirty: bool = False
    """Whether numbers of uncommitted code may be accepted."""
    bisect: bool = False
    """Whether exit codes are for `git bisect run`."""
    base: str | None = None
    """The revision whose merge base provides the baselines."""
    waivers: tuple[Waiver, ...] = ()
    rules: Rules
    """Where the rules of this run come from, for a comparison with those at the merge base."""
    code: tuple[Path, ...] = ()
    """Where the tests and cases of this run come from."""
    reports: tuple[Path, ...] = ()
    """Files that pytest and pytest-benchmark write in this run."""


def add_options(parser: pytest.Parser) -> None:
    """Add options and ini options. All of them need the first, whose short name is `--benchmark`."""
    group = parser.getgroup("hpc-core", "performance regressions (hpc-core)")
    add = group.addoption
    add(
        "--perf-benchmark",
        action="store_true",
        dest=ACTIVE,
        help="run the performance suite: the given paths, or perf_paths (short: --benchmark)",
    )
    add(
        "--perf-scale",
        choices=_SCALES,
        default=None,
        help="tiny (CPU, seconds), small (CPU, real weights), full (GPU); auto: full on a GPU, else tiny",
    )
    add(
        "--perf-case",
        action="append",
        default=[],
        metavar="GLOB",
        help="run only cases whose full id matches, such as 'tiny/lora*'; repeatable (short: --case)",
    )
    add(
        "--perf-all",
        action="store_true",
        help="also run what is marked perf_on_request, which otherwise needs --perf-case or its path (short: --all)",
    )
    add("--perf-update", action="store_true", help="make the results of this run the baselines; needs --perf-reason")
    add(
        "--perf-reason",
        default="",
        metavar="TEXT",
        help="why the new numbers are right; stored in the baseline (short: --reason)",
    )
    add(
        "--perf-allow-dirty",
        action="store_true",
        help="with --perf-update: accept numbers of uncommitted code",
    )
    add(
        "--perf-base",
        default=None,
        metavar="REV",
        help="judge by the baselines, limits, waivers and settings of the merge base with REV (such as origin/main), and list what changed since",
    )
    add(
        "--perf-baselines",
        default=None,
        metavar="DIR",
        help="folder of baselines (ini: perf_baselines, default: baselines)",
    )
    add(
        "--perf-strict",
        action="store_true",
        default=None,
        help="fail where a chosen case was not measured or cannot be compared (exit code 10); the default where CI is set",
    )
    add(
        "--perf-lenient",
        action="store_false",
        default=None,
        dest="perf_strict",
        help="skip such cases, although CI is set",
    )
    add(
        "--perf-bisect",
        action="store_true",
        help="for git bisect run: like --perf-strict, but exit with 125 (skip this commit) where nothing got worse and the case cannot be judged",
    )
    add("--perf-inline", action="store_true", help="run cases in this process, for --pdb")
    add(
        "--perf-launch",
        choices=("warm", "exec"),
        default="warm",
        help="fork workers from a preloaded parent (warm, the default), or start an interpreter for each (exec)",
    )
    add("--perf-records", default=None, metavar="DIR", help="write each record as DIR/<shape>/<variant>.json")
    add(
        "--perf-resume",
        default=None,
        metavar="DIR",
        help="like --perf-records, and reuse the records of an earlier run there if case, code, stack and machine are the same",
    )
    add(
        "--perf-processes",
        default=None,
        metavar="N|auto",
        help="processes per case, for its GPU-busy time (ini: perf_processes); auto, the default: on a GPU 1 if it decides, else 3; 1 on a CPU",
    )
    add(
        "--perf-budget",
        default=None,
        metavar="MINUTES",
        help="start no further process of a case after this time; with auto, run more processes until their times agree",
    )
    add(
        "--perf-cases",
        action="append",
        default=[],
        metavar="FILE",
        dest="perf_case_files",
        help="also run the CASES of this Python file (ini: perf_cases; short: --cases)",
    )
    add(
        "--perf-fault",
        default=None,
        metavar="NAME",
        help="inject a fault, to check that the gate catches it",
    )
    add(
        "--perf-predict",
        choices=("short", "all", "off"),
        default=None,
        help="predict GPU memory without a GPU: a short set (the default where none is visible), all cases, or none",
    )
    parser.addini("perf_paths", "paths that --benchmark runs when none is given", type="args", default=["bench"])
    parser.addini("perf_baselines", "folder of baselines, below the root folder", default=BASELINES)
    parser.addini("perf_waivers", "file of waivers, below the root folder", default=WAIVERS)
    parser.addini("perf_processes", "processes per case: a number, or auto", default="auto")
    parser.addini("perf_cases", "Python files whose CASES also run", type="args", default=[])


def use_short_names(config: pytest.Config, parser: pytest.Parser, arguments: list[str]) -> None:
    """Replace the short names among the arguments by our full ones, unless a plugin or an initial conftest.py has them.

    They are not registered: a conftest.py that pytest reads later may register the same, and that would end the run.
    """
    # pytest has no public list of its options.
    groups = [*parser._groups, parser._anonymous]
    taken = {name for group in groups for option in group.options for name in option.names()}
    ours = config.stash[_SPELLED] = {short: long for short, long in _SHORT.items() if short not in taken}
    end = arguments.index("--") if "--" in arguments else len(arguments)
    for at, argument in enumerate(arguments[:end]):
        name, is_value, value = argument.partition("=")
        arguments[at] = f"{ours.get(name, name)}{is_value}{value}"


def spelled(config: pytest.Config, short: str) -> str:
    """Return an option as a user may write it here: the short name, or our full one where somebody else has the short one."""
    return short if short in config.stash.get(_SPELLED, {}) else _SHORT[short]


def read_settings(config: pytest.Config) -> Settings:
    """Return the settings of a run with `--benchmark`.

    Raises:
        pytest.UsageError: options contradict each other, or name something that does not exist.
    """
    _refuse_moved_root(config)
    option = config.getoption
    update, reason = bool(option("perf_update")), str(option("perf_reason")).strip()
    fault = cast("str | None", option("perf_fault"))
    _refuse(config, update=update, reason=reason, fault=fault)
    scale, why = _scale(config, option("perf_scale"))
    asked = {name: option(name) if is_given(config, f"--{name.replace('_', '-')}") else None for name in _EXTENT}
    own_scale, own_why = _scale(config, asked["perf_scale"])
    records, resume = option("perf_records"), option("perf_resume")
    if records is not None and resume is not None:
        raise pytest.UsageError(
            "--perf-records and --perf-resume both name the folder of records. Drop --perf-records."
        )
    here = config.invocation_params.dir
    baselines = _baselines(config, update=update)
    _refuse_code(for_update=update and not config.getoption("perf_allow_dirty"))
    return Settings(
        scale=scale,
        why_scale=why,
        globs=tuple(option("perf_case")),
        all=bool(option("perf_all")),
        update=update,
        reason=reason,
        baselines=baselines,
        strict=bool(strictness(config)),
        why_strict=strictness(config),
        way="inline" if option("perf_inline") else cast("Way", option("perf_launch")),
        records=_writable(here / (records or resume)) if records or resume else None,
        resume=None if resume is None else here / resume,
        processes=_processes(config),
        budget_s=_budget_s(config),
        case_files=_case_files(config),
        fault=fault,
        predict=_extent(option("perf_predict"), why),
        own_scale=own_scale,
        own_predict=_extent(asked["perf_predict"], own_why),
        paths=tuple(str(root_of(config) / path) for path in config.getini("perf_paths")),
        allow_dirty=bool(option("perf_allow_dirty")),
        bisect=bool(option("perf_bisect")),
        base=option("perf_base"),
        waivers=read_waivers(config),
        rules=_rules(config, baselines),
        code=_code(config),
        reports=_reports(config),
    )


def _rules(config: pytest.Config, baselines: Path) -> Rules:
    file = config.getoption("inifilename", None)
    here = config.invocation_params.dir
    given = [*config.invocation_params.args, os.environ.get("PYTEST_ADDOPTS", "")]
    raw = b"" if config.inipath is None else config.inipath.read_bytes()
    return Rules(
        root=root_of(config),
        file=None if file is None else here / file,
        here=here,
        baselines=baselines,
        named=any("perf-baselines" in str(each) or "perf_baselines" in str(each) for each in given),
        settings={} if config.inipath is None else pytest_settings(config.inipath, raw) or {},
    )


def _code(config: pytest.Config) -> tuple[Path, ...]:
    given = [*config.args, *config.getini("perf_paths"), *config.getini("perf_cases")]
    places = [root_of(config) / str(name).partition("::")[0] for name in [*given, *config.getoption("perf_case_files")]]
    return (root_of(config), *(place for place in places if place.exists()))


def _reports(config: pytest.Config) -> tuple[Path, ...]:
    table = config.getoption("benchmark_json", None)  # an open file
    names = [config.getoption("xmlpath", None), getattr(table, "name", None)]
    return tuple(config.invocation_params.dir / name for name in names if name)


def strictness(config: pytest.Config) -> str:
    """Return what makes this run strict: an option, or the environment variable CI; empty if it is not."""
    for name in ("perf_bisect", "perf_strict"):
        if config.getoption(name):
            return f"--{name.replace('_', '-')}"
    in_ci = os.environ.get("CI", "").strip().lower() not in ("", "0", "false")
    return "CI is set" if in_ci and config.getoption("perf_strict") is None else ""


def is_given(config: pytest.Config, *options: str) -> bool:
    """Return whether the command line itself has one of these options; settings and PYTEST_ADDOPTS do not count."""
    short = tuple(option for option in options if not option.startswith("--"))
    given = map(str, config.invocation_params.args)
    return any(each.partition("=")[0] in options or (bool(short) and each.startswith(short)) for each in given)


def is_whole(config: pytest.Config) -> bool:
    """Return whether the command line asks for the whole suite: it names no path, and chooses nothing."""
    given = set(map(str, config.invocation_params.args))
    names_a_path = config.args_source is pytest.Config.ArgsSource.ARGS and not given.isdisjoint(config.args)
    return not names_a_path and not is_given(config, *_CHOOSING)


def is_listing(config: pytest.Config) -> bool:
    """Return whether the command line asks to list something instead of running it. Settings cannot ask for that."""
    return not _LISTING.isdisjoint(config.invocation_params.args)


def _refuse(config: pytest.Config, *, update: bool, reason: str, fault: str | None) -> None:
    _refuse_settings(config, update=update)
    plugins = config.pluginmanager
    if not plugins.hasplugin("benchmark"):
        raise pytest.UsageError("--benchmark needs pytest-benchmark, which is switched off: drop -p no:benchmark.")
    if config.getoption("numprocesses", None) or config.getoption("tx", None):
        raise pytest.UsageError("--benchmark with -n: cases that run in parallel disturb each other. Drop -n.")
    if update and not reason:
        raise pytest.UsageError('--perf-update needs --reason "…": why are the new numbers right?')
    if reason and not update:
        raise pytest.UsageError("--reason needs --perf-update; without it nothing is written.")
    if config.getoption("perf_bisect") and (update or fault):
        raise pytest.UsageError("--perf-bisect only judges. Drop --perf-update and --perf-fault.")
    if config.getoption("perf_allow_dirty") and not update:
        raise pytest.UsageError("--perf-allow-dirty needs --perf-update; without it nothing is written.")
    if fault and fault not in (known := _faults()):
        raise pytest.UsageError(f"--perf-fault: no fault is called {fault!r}. Faults: {', '.join(known)}.")
    if update and fault:
        raise pytest.UsageError(
            f"--perf-fault {fault} with --perf-update: a run with a fault cannot be a baseline. Drop one of the two."
        )


def _refuse_moved_root(config: pytest.Config) -> None:
    """Refuse a value of our options that pytest mistook for the path of a test.

    pytest chooses its root folder and reads its settings before it knows our options: `--perf-records /tmp/runs` would lose both.
    """
    here = config.invocation_params.dir
    words = [*shlex.split(os.environ.get("PYTEST_ADDOPTS", "")), *map(str, config.invocation_params.args)]
    mistaken = [
        (option, value)
        for option, value in pairwise(words)
        if option.startswith(("--perf-", "--cases")) and not value.startswith("-") and (here / value).exists()
    ]
    if not mistaken or config.getoption("inifilename", None) or config.getoption("rootdir", None):
        return
    is_named = config.args_source is pytest.Config.ArgsSource.ARGS
    named = [here / str(each).partition("::")[0] for each in config.args] if is_named else [here]
    start = Path(os.path.commonpath([path.resolve() for path in named]))
    expected, found = settings_above(start), config.inipath
    if found is not None and pytest_settings(found, found.read_bytes()) is None:
        found = None  # a pyproject.toml without settings of pytest
    if expected is not None and (found is None or expected != found.resolve()):
        option, value = mistaken[0]
        raise pytest.UsageError(
            f"pytest took {value} for the path of a test, and {config.rootpath} for the root folder, so it does not read {expected}. "
            f"Write {option}={value}."
        )


def _refuse_settings(config: pytest.Config, *, update: bool) -> None:
    """Refuse options that would make every run green where settings or PYTEST_ADDOPTS give them."""
    if update and not is_given(config, "--perf-update"):
        raise pytest.UsageError(
            "--perf-update in settings or PYTEST_ADDOPTS: every run would accept what it measures. Give it on the command line."
        )
    if strictness(config) and config.getoption("perf_case") and not is_given(config, "--perf-case", "--case"):
        raise pytest.UsageError(
            f"--perf-case in settings or PYTEST_ADDOPTS, and strict ({strictness(config)}): every run would leave out the "
            "other cases. Give it on the command line."
        )


def _refuse_code(*, for_update: bool) -> None:
    """Refuse now what no record could be made or accepted with: after minutes of measuring it would be too late."""
    try:
        named_commit()
    except SpecError as error:
        raise pytest.UsageError(str(error)) from error
    known, dirty = commit() if for_update else (None, None)
    why = why_without_commit(known, dirty)
    if for_update and why is not None:
        changed = changed_code(Path.cwd()) if dirty else ()
        more = f" and {len(changed) - _MOST_NAMES} more" if len(changed) > _MOST_NAMES else ""
        files = f" Uncommitted: {', '.join(changed[:_MOST_NAMES])}{more}." if changed else ""
        raise pytest.UsageError(f"--perf-update: {why}{files}")


def _baselines(config: pytest.Config, *, update: bool) -> Path:
    given, configured = config.getoption("perf_baselines"), str(config.getini("perf_baselines"))
    folder: Path = config.invocation_params.dir / given if given else root_of(config) / configured
    named = "--perf-baselines" if given else "perf_baselines"
    if folder.exists() and not folder.is_dir():
        raise pytest.UsageError(f"{named}: {folder} is not a folder.")
    if not folder.exists() and not update and (given or configured != BASELINES):
        raise pytest.UsageError(
            f"{named}: the folder {folder} does not exist. Correct its name, or write its first baseline with --perf-update."
        )
    return folder


def _writable(folder: Path) -> Path:
    """Make the folder of records, so that a run of hours does not end with records that nobody can write.

    Raises:
        pytest.UsageError: it cannot be made, or not be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise pytest.UsageError(f"{folder}: records cannot be written there: {error.strerror}.") from error
    if not os.access(folder, os.W_OK):
        raise pytest.UsageError(f"{folder}: records cannot be written there: no right to write.")
    return folder


def _processes(config: pytest.Config) -> int | Literal["auto"]:
    given = config.getoption("perf_processes")
    text = str(config.getini("perf_processes") if given is None else given).strip()
    if text == "auto":
        return "auto"
    if not text.isdecimal() or not 1 <= int(text) <= MOST:
        raise pytest.UsageError(f"--perf-processes: expected a number from 1 to {MOST}, or auto, got {text!r}.")
    if int(text) > 1 and config.getoption("perf_inline"):
        raise pytest.UsageError(
            f"--perf-processes {text} with --perf-inline: an inline run has one process. Drop one of the two."
        )
    return int(text)


def _budget_s(config: pytest.Config) -> float | None:
    text = config.getoption("perf_budget")
    if text is None:
        return None
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes < math.inf:
        raise pytest.UsageError(f"--perf-budget: expected minutes above 0, got {text!r}.")
    return minutes * 60


def _faults() -> list[str]:
    # Imported by name, since faults belong to the measuring half. Their names need no torch.
    return sorted(importlib.import_module("hpc_core.faults.catalogue").FAULTS)


def _scale(config: pytest.Config, given: object) -> tuple[Literal["tiny", "small", "full"] | None, str]:
    """Return the scale and why it was chosen; `given` is the value of --perf-scale."""
    if given in ("tiny", "small", "full"):
        return given, "--perf-scale"
    if config.getoption("perf_case"):
        return None, "--case"
    if _GPU_WORD.search(str(config.getoption("markexpr", ""))):
        return None, "-m"
    gpus = visible_gpus()
    return ("full", str(gpus[0]["name"])) if gpus else ("tiny", "no CUDA GPU is visible")


def _extent(given: object, why_scale: str) -> Extent:
    """Return which predictions are made; `given` is the value of --perf-predict.

    Without one: all predictions with `--case`, the short set where no GPU is visible, and none where a scale was chosen.

    With `--case` a GPU runs the cases that are measured here; only what is not is predicted.
    """
    if given is not None:
        return cast("Extent", given)
    if why_scale == "--case":
        return "all"
    return "off" if why_scale in ("--perf-scale", "-m") or visible_gpus() else "short"


def _case_files(config: pytest.Config) -> tuple[Path, ...]:
    given = [config.invocation_params.dir / name for name in config.getoption("perf_case_files")]
    configured = [root_of(config) / name for name in config.getini("perf_cases")]
    files = tuple(dict.fromkeys(path.resolve() for path in [*given, *configured]))
    for path in files:
        try:
            load_case_file(path)  # so that an error is one line, not a collection error
        except SpecError as error:
            raise pytest.UsageError(str(error)) from error
    return files


def read_waivers(config: pytest.Config) -> tuple[Waiver, ...]:
    """Read the file of waivers. Return none if the file is missing and the ini file does not name it.

    Raises:
        pytest.UsageError: the file that the ini file names does not exist, or a file is not valid.
    """
    name = str(config.getini("perf_waivers"))
    path = root_of(config) / name
    if not path.exists():
        if name != WAIVERS:
            raise pytest.UsageError(f"perf_waivers: the file {path} does not exist.")
        return ()
    try:
        return waivers_from_toml(read_regular(path).decode(), name)
    except SpecError as error:
        raise pytest.UsageError(str(error)) from error
    except (OSError, UnicodeDecodeError) as error:
        raise pytest.UsageError(f"{name} cannot be read: {error}") from error
