"""Read records from files, folders, a run's `--benchmark-json` and folders of baselines. For reports, not for verdicts.

What is read here may come from strangers (a pull request's artifact), so nothing is trusted: sizes, names and keys are checked,
long texts are cut, and a file that is not a record is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from hpc_core.baselines.baseline import Baseline, OlderSchema
from hpc_core.baselines.lookup import baseline_path, parsed
from hpc_core.baselines.pull_request import NAME as PULL_REQUEST
from hpc_core.baselines.pull_request import pull_request_from_json
from hpc_core.case.case import SCHEMA
from hpc_core.case.errors import BaselineError, SpecError
from hpc_core.record.files import read_regular
from hpc_core.record.plain import all_plain, plain
from hpc_core.record.record import Circumstances, Record, record_from_json, schema_of

LONGEST_NAME = 160
"""Characters of a case's id or a machine's key, which become file names."""
LONGEST_TEXT = 4000
"""Characters that are kept of any text of a record, except in its case."""
_LONGEST_LINE = 1000
_SUFFIXES = (".json", ".jsonl")
_HISTORY = ".history.jsonl"
_BASELINE = b'"accepted"'
_RUN = b'"benchmarks"'


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """What was found, and what was left out."""

    records: tuple[Record, ...]
    notes: tuple[str, ...]
    loosened: tuple[str, ...] = ()
    """What the pull request of the run loosens, a line each."""


class _Bench(msgspec.Struct):
    """A benchmark in pytest-benchmark's file, with the extra information that the plugin adds."""

    extra_info: dict[str, msgspec.Raw] = {}


class _Run(msgspec.Struct):
    benchmarks: list[_Bench]


class _Extra(msgspec.Struct):
    record: msgspec.Raw = msgspec.Raw(b"")


def read_records(paths: Iterable[Path]) -> Reading:
    """Return the records of these files and folders, each once, in the order in which they were found.

    A named file must hold records. Other files in a folder are named in the notes.

    Raises:
        SpecError: no such path; a named file that is not a record; no record at all.
    """
    chosen = list(paths)
    found: dict[bytes, Record] = {}
    notes: list[str] = []
    loosened: dict[str, None] = {}
    for path in chosen:
        for file in _files(path):
            try:
                if file.name == PULL_REQUEST:
                    loosened |= dict.fromkeys(_loosened(file))
                    continue
                read = _read(file)
            except SpecError as error:
                if not path.is_dir():
                    raise
                notes.append(f"left out {error}")
                continue
            for record in read:
                found.setdefault(msgspec.json.encode(record, order="sorted"), record)
    if not found:
        raise SpecError(_nothing(chosen, notes))
    return Reading(records=tuple(found.values()), notes=tuple(notes), loosened=tuple(loosened))


def _loosened(file: Path) -> list[str]:
    try:
        found = pull_request_from_json(_content(file))
    except msgspec.MsgspecError as error:
        raise SpecError(f"{file}: not what --perf-base writes: {plain(str(error), 300)}") from error
    return [plain(each.line, _LONGEST_LINE) for each in found.loosened]


def _nothing(paths: list[Path], notes: list[str]) -> str:
    where = ", ".join(str(path) for path in paths)
    more = f" {notes[0][0].upper()}{notes[0][1:]}" if notes else ""
    return f"{where}: no record found. Records are written by pytest --benchmark --perf-records=DIR.{more}"


def _files(path: Path) -> Iterator[Path]:
    """Return the file, or those below the folder; a baseline stands for its history.

    Raises:
        SpecError: there is no such file or folder.
    """
    if path.is_dir():
        yield from sorted(
            each
            for each in path.rglob("*")
            if each.suffix in _SUFFIXES
            and not each.name.startswith(".")
            and not each.is_dir()
            and not _has_baseline(each)
        )
    elif path.exists():
        yield path
    else:
        raise SpecError(f"{path}: no such file or folder.")


def _has_baseline(path: Path) -> bool:
    """Return whether it is a history that is read with its baseline."""
    return path.name.endswith(_HISTORY) and path.with_name(path.name.replace(_HISTORY, ".json")).exists()


def _read(path: Path) -> list[Record]:
    """Return the records of one file.

    Raises:
        SpecError: it holds none, or one that is unsafe to show; the message names the file and repeats nothing unsafe of it.
    """
    raw = _content(path)
    try:
        if path.suffix == ".jsonl":
            return _of_lines(raw)
        if _BASELINE in raw and isinstance(lookup := parsed(str(path), raw), Baseline | OlderSchema):
            return _of_baseline(path, lookup)
        if _RUN in raw and (texts := _of_run(raw)) is not None:
            return [_checked(text) for text in texts]
        return [_checked(raw)]
    except (SpecError, BaselineError, msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise SpecError(f"{path}: {plain(str(error), 300)}") from error


def _content(path: Path) -> bytes:
    try:
        return read_regular(path)
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}.") from error


def _of_baseline(path: Path, lookup: Baseline | OlderSchema) -> list[Record]:
    """Return the accepted records of a baseline; without any, its gated values as a record of their own."""
    if isinstance(lookup, OlderSchema):
        raise SpecError(f"a baseline of schema {lookup.found}, this hpc-core reads {lookup.known}.")
    history = path.with_suffix(_HISTORY)
    if history.exists() and (accepted := _of_lines(_content(history))):
        return accepted
    seen = Circumstances(
        machine=lookup.machine,
        stack=lookup.stack,
        python=lookup.python,
        host_cpu="unknown",
        launched="exec",
        started_at=lookup.accepted.at,
        commit=lookup.accepted.commit,
        dirty=lookup.accepted.dirty,
        notes=("Only the gated values of this session are stored: its record is not next to the baseline.",),
    )
    made = Record(case=lookup.spec, status="ok", metrics=lookup.metrics, circumstances=seen)
    return [_checked(msgspec.json.encode(made))]


def _of_lines(raw: bytes) -> list[Record]:
    """Return the records of a history. Lines of another schema are left out.

    Raises:
        SpecError: a line is not a record of any schema.
    """
    found = []
    for line in filter(None, raw.splitlines()):
        if schema_of(line) == SCHEMA:
            found.append(_checked(line))
    return found


def _of_run(raw: bytes) -> list[bytes] | None:
    """Return the records in pytest-benchmark's file; None where it is another file.

    Raises:
        SpecError: it is one, without a record of hpc-core.
    """
    try:
        benchmarks = msgspec.json.decode(raw, type=_Run).benchmarks
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    found = []
    for bench in benchmarks:
        try:
            extra = msgspec.json.decode(bench.extra_info.get("record", msgspec.Raw(b"{}")), type=_Extra)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            continue
        if bytes(extra.record):
            found.append(bytes(extra.record))
    if not found:
        raise SpecError(f"{len(benchmarks)} benchmarks of pytest-benchmark, none of them with a record of hpc-core.")
    return found


def _checked(raw: bytes) -> Record:
    """Return a record that is safe to show.

    Raises:
        SpecError: it is not a record, or has names that no record of hpc-core has.
    """
    record = record_from_json(raw)
    machine = record.circumstances.machine
    for what, name in (("case id", record.case.id), ("machine's key", machine.key)):
        if len(name) > LONGEST_NAME:
            raise SpecError(f"a {what} of {len(name):,} characters; {LONGEST_NAME} are allowed.")
    try:
        baseline_path(Path(), machine.key, record.case.id)
    except BaselineError as error:
        raise SpecError(plain(str(error), 200)) from error
    # The texts of nearly all records are short: a search in the bytes saves a visit to each of them.
    if not may_hold_longer(raw, LONGEST_TEXT):
        return record
    content = msgspec.to_builtins(record)
    cut = {name: value if name == "case" else all_plain(value, LONGEST_TEXT) for name, value in content.items()}
    return msgspec.convert(cut, Record)


def may_hold_longer(raw: bytes, most: int) -> bool:
    """Return whether a text of this JSON could have more than so many characters. True may be wrong, False never is.

    Escaped quotes do not end a text, so they are removed first. A quote after an escaped backslash does end one; then two texts
    count as one.
    """
    return max(map(len, raw.replace(b'\\"', b"  ").split(b'"'))) > most
