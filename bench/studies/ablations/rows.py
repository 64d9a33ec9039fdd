"""Run the rows of an ablation, each in its own process with a time limit, and keep the results as a table and in a JSON file.

`train.py` and `decode.py` define what a row runs and what it measures.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.studies.refusals import what_is_missing
from hpc_core.case.case import Case
from hpc_core.case.errors import SpecError
from hpc_core.record.environment import machine, stack

__all__ = ["Measure", "Rows", "options_of", "run_rows"]

Rows = dict[str, dict[str, Any]]
"""Results by "group: row"."""
Measure = Callable[[Case, str], dict[str, Any]]
"""Measures one row, a case on a device, in this process."""
_SHOWN = 160


def options_of(ask: argparse.ArgumentParser, *, out: str, limit_s: float) -> argparse.ArgumentParser:
    """Return a parser with the options that every ablation has."""
    ask.add_argument("--only", default="", help="rows by name, separated by commas with no space after them")
    ask.add_argument("--steps", action="store_true", help="only the rows from stock to tuned, one thing more each")
    ask.add_argument("--shape", default="llama-3.2-3b")
    ask.add_argument("--device", default="cuda")
    ask.add_argument("--limit-s", type=float, default=limit_s, help="seconds a row may take")
    ask.add_argument("--total-s", type=float, default=1500.0, help="no row begins after so many seconds")
    ask.add_argument("--out", default=out, help="kernels of each row go into a file beside it, -kernels.json")
    return ask


def chosen_cases(
    ask: argparse.ArgumentParser,
    cases: Callable[[], dict[str, Case]],
    named: Sequence[str],
    known: Sequence[str],
    option: str,
) -> dict[str, Case]:
    """Return the rows' cases, before anything slow is imported. An unknown name, shape or size ends the program with a sentence."""
    unknown = [name for name in named if name not in known]
    if unknown:
        ask.error(f"{option} {','.join(unknown)!r}: there are {', '.join(known)}")
    try:
        return cases()
    except SpecError as error:
        ask.error(str(error))


def run_rows(
    chosen: Mapping[str, Case],
    measure: Measure,
    options: argparse.Namespace,
    *,
    columns: Sequence[str],
    steps: Mapping[str, Mapping[str, Any]],
    finish: Callable[[Rows], None] = lambda rows: None,
) -> None:
    """Run the chosen rows, print the table after each, and write everything into a JSON file.

    `steps`: by group, its title and the labels of the rows from stock to tuned, for `bench.studies.ablations.ladder`; `finish` adds values that
    depend on several rows.
    """
    _refuse_what_cannot_be_run(chosen, options)
    began = time.monotonic()
    ladder = {name for each in steps.values() for name in each["rows"]}
    wanted = _names(options.only)
    rows: Rows = {}
    source = "unknown"
    for name, case in chosen.items():
        if (wanted and name.partition(": ")[2] not in wanted) or (options.steps and name not in ladder):
            continue
        if time.monotonic() - began > options.total_s:
            rows[name] = {"error": "not begun: the time was over"}
            continue
        start = time.monotonic()
        rows[name] = run_in_child(measure, case, options.device, options.limit_s)
        source = rows[name].pop("source", source)
        finish(rows)
        sys.stdout.write(f"{_line(name, rows[name], columns)} ({time.monotonic() - start:.0f} s)\n")
        sys.stdout.flush()
        _keep(Path(options.out), rows, source, steps)
    sys.stdout.write("\n" + "\n".join(table(rows, columns)) + "\n")
    for name, found in rows.items():
        if "\n" in str(found.get("error", "")):
            sys.stdout.write(f"\n{name}\n{found['error'][-4000:]}\n")


def _refuse_what_cannot_be_run(chosen: Mapping[str, Case], options: argparse.Namespace) -> None:
    """Exit with code 2 and a sentence before minutes of measuring."""
    there = list(dict.fromkeys(name.partition(": ")[2] for name in chosen))
    said = ""
    if unknown := [name for name in _names(options.only) if name not in there]:
        said = f"no row is called {'; '.join(unknown)}; there are {'; '.join(there)}"
    if said := said or what_is_missing(options.device, options.out):
        sys.stderr.write(f"{Path(sys.argv[0]).name}: {said}\n")
        sys.exit(2)


def _names(only: str) -> list[str]:
    """Split at commas without a space; names may contain a comma and a space ("all, 4.5 GiB")."""
    return [each.replace("\0", ", ") for each in only.replace(", ", "\0").split(",") if each]


def _keep(path: Path, rows: Rows, source: str, steps: Mapping[str, Mapping[str, Any]]) -> None:
    slim = {name: {key: value for key, value in found.items() if key != "top_kernels"} for name, found in rows.items()}
    ladders = {group: told for group, told in steps.items() if any(name in rows for name in told["rows"])}
    path.write_text(json.dumps({"source": source, "steps": ladders, "rows": slim}, indent=1) + "\n")
    kernels = {name: found["top_kernels"] for name, found in rows.items() if "top_kernels" in found}
    if kernels:
        path.with_name(f"{path.stem}-kernels.json").write_text(json.dumps(kernels, indent=1) + "\n")


def _source(device: str) -> str:
    """Return machine, stack, script and date."""
    kind: Any = "cuda" if device.startswith("cuda") else "cpu"
    versions = ", ".join(f"{name} {version}" for name, version in stack(kind).items())
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    return f"{machine(kind).name}, {versions}; bench/{Path(sys.argv[0]).name}, {day}; one process a row"


def run_in_child(measure: Measure, case: Case, device: str, limit_s: float) -> dict[str, Any]:
    """Measure the row in a forked process; if it fails or takes too long, return its traceback or a message."""
    with tempfile.NamedTemporaryFile(suffix=".json", delete=False) as file:
        path = Path(file.name)
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            try:
                found = measure(case, device)  # here, because the parent should not initialize CUDA before it forks
                path.write_text(json.dumps({"source": _source(device), **found}))
                code = 0
            except BaseException:
                path.write_text(json.dumps({"error": traceback.format_exc()}))
        os._exit(code)
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        path.unlink(missing_ok=True)
        return {"error": f"took more than {limit_s:g} s"}
    text = path.read_text()
    path.unlink(missing_ok=True)
    return dict(json.loads(text)) if text else {"error": f"the process ended with status {status} and said nothing"}


def table(rows: Rows, columns: Sequence[str]) -> Iterable[str]:
    """Return the rows as Markdown."""
    yield "| row | " + " | ".join(columns) + " | remarks |"
    yield "|---" * (len(columns) + 2) + "|"
    for name, found in rows.items():
        yield _line(name, found, columns)


def _line(name: str, found: dict[str, Any], columns: Sequence[str]) -> str:
    cells = [f"{found[each]:.4g}" if found.get(each) is not None else "" for each in columns]
    last = str(found.get("error", "")).strip().splitlines()
    remarks = [last[-1][:_SHOWN] if last else "", str(found.get("fallen") or "")[:200], str(found.get("plan") or "")]
    remarks.append(str(found.get("busy_error", ""))[:_SHOWN])
    return f"| {name} | " + " | ".join(cells) + f" | {' '.join(each for each in remarks if each)} |"
